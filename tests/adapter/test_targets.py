"""find_sites: every form of target, what it picks, and errors that name the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait
from plait import PlaitError, find_sites
from plait.adapter import block_index, find_blocks
from plait.adapter.site import EmbeddingSite, LinearSite, ParameterSite, TransposedLinearSite
from plait.testing import make_model, tiny_llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def llama() -> nn.Module:
    return tiny_llama()


def paths(*args: object, **kwargs: object) -> list[str]:
    return [s.path for s in find_sites(*args, **kwargs)]  # type: ignore[arg-type]


def test_all_linear_takes_every_linear_but_the_output_head(llama: nn.Module) -> None:
    found = paths(llama, "all-linear")
    linears = [n for n, m in llama.named_modules() if isinstance(m, nn.Linear)]
    assert found == [n for n in linears if n != "lm_head"] and len(found) == 14


def test_names_match_the_exact_path_or_its_ending_after_a_dot(llama: nn.Module) -> None:
    assert len(paths(llama, ["q_proj"])) == 2
    assert paths(llama, "model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert len(paths(llama, ["mlp.up_proj", "q_proj"])) == 4
    with pytest.raises(PlaitError):
        paths(llama, ["proj"])  # an ending, but not after a dot


def test_an_order_of_names_does_not_change_the_order_of_sites(llama: nn.Module) -> None:
    assert paths(llama, ["v_proj", "q_proj"]) == paths(llama, ["q_proj", "v_proj"])


def test_a_regular_expression_must_match_the_whole_path(llama: nn.Module) -> None:
    assert paths(llama, r".*layers\.0\..*_proj") == [
        p for p in paths(llama, "all-linear") if ".0." in p
    ]
    with pytest.raises(PlaitError, match=r"whole path.*model\.layers\.0\.self_attn\.q_proj"):
        paths(llama, r"layers\.0\..*")
    with pytest.raises(PlaitError, match="not a regular expression"):
        paths(llama, r"(q_proj")


def test_a_function_of_path_and_module_picks(llama: nn.Module) -> None:
    wide = paths(llama, lambda path, m: isinstance(m, nn.Linear) and m.in_features == 24)
    assert wide == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    with pytest.raises(PlaitError, match="picked no module"):
        paths(llama, lambda path, m: False)


def test_keywords_pick_their_kind_of_site(llama: nn.Module) -> None:
    (embedding,) = find_sites(llama, "embeddings")
    assert isinstance(embedding, EmbeddingSite) and embedding.shape == (16, 32)
    blocks = find_sites(llama, "blocks")
    assert [b.path for b in blocks] == ["model.layers.0", "model.layers.1"]
    assert all(b.kind == "module" and b.shape == (16,) for b in blocks)
    assert [s.path for s in find_sites(llama, "ffn")] == [f"{b.path}.mlp" for b in blocks]
    experts = find_sites(make_model("parameter"), "experts")
    assert [(s.path, s.shape) for s in experts] == [
        ("experts.up", (3, 16, 12)),
        ("experts.down", (3, 12, 16)),
    ]
    assert [s.shape for s in find_sites(make_model("conv"), "all-conv")] == [(6, 36), (10, 54)]


def test_a_keyword_and_names_may_stand_in_one_list(llama: nn.Module) -> None:
    found = paths(llama, ["embeddings", "q_proj"])
    assert found[0] == "model.embed_tokens" and len(found) == 3


def test_a_keyword_that_a_model_has_nothing_of_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"all-conv.*matches nothing in LlamaForCausalLM"):
        find_sites(llama, "all-conv")


def test_a_keyword_of_a_kind_that_the_method_cannot_act_on_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"embed_tokens.*acts on: linear"):
        find_sites(llama, "embeddings", kinds={"linear"})
    with pytest.raises(PlaitError, match="acts on: linear"):
        find_sites(llama, ["embeddings", "q_proj"], kinds={"linear"})


def test_a_named_module_of_a_kind_that_the_method_cannot_act_on_is_an_error(
    llama: nn.Module,
) -> None:
    with pytest.raises(PlaitError, match=r"embed_tokens.*Embedding.*linear"):
        find_sites(llama, ["embed_tokens"], kinds={"linear"})
    with pytest.raises(PlaitError, match="RMSNorm"):
        find_sites(llama, ["input_layernorm"])


def test_exclude_takes_the_same_forms(llama: nn.Module) -> None:
    everything = paths(llama, "all-linear")
    for exclude in (ATTENTION, r".*self_attn.*_proj", lambda p, m: p.endswith(tuple(ATTENTION))):
        kept = paths(llama, "all-linear", exclude=exclude)
        assert kept == [p for p in everything if not p.endswith(tuple(ATTENTION))]
    with pytest.raises(PlaitError, match=r"exclude 'q_prj'.*did you mean 'q_proj'"):
        paths(llama, "all-linear", exclude=["q_prj"])
    with pytest.raises(PlaitError, match="no site is left"):
        paths(llama, ["q_proj"], exclude="all-linear")


def test_layers_keep_only_those_blocks(llama: nn.Module) -> None:
    assert paths(llama, ATTENTION, layers=1) == [f"model.layers.1.self_attn.{n}" for n in ATTENTION]
    assert paths(llama, "all-linear", layers=[0, 1]) == paths(llama, "all-linear")
    with pytest.raises(PlaitError, match=r"layers \[7\].*layers 0 to 1"):
        find_sites(llama, "all-linear", layers=[1, 7])


def test_layers_pattern_names_another_list(llama: nn.Module) -> None:
    model = nn.Module()
    model.stage = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
    assert paths(model, "all-linear", layers=[2], layers_pattern="stage") == ["stage.2"]
    assert block_index("x.stage.3.y", "stage") == 3 and block_index("model.h.12.attn") == 12
    assert block_index("model.embed") is None


@pytest.mark.parametrize(
    ("wrong", "guess"),
    [("q_prj", "q_proj"), ("up_pro", "up_proj"), ("model.layers.0.mlp.up_poj", "up_proj")],
)
def test_a_wrong_name_is_an_error_that_names_the_nearest(
    llama: nn.Module, wrong: str, guess: str
) -> None:
    with pytest.raises(PlaitError, match=f"{wrong}.*did you mean '[^']*{guess}'"):
        find_sites(llama, [wrong])


def test_one_wrong_name_among_right_ones_is_not_passed_over(llama: nn.Module) -> None:
    with pytest.raises(PlaitError, match="no_such"):
        find_sites(llama, ["q_proj", "no_such"])
    with pytest.raises(PlaitError, match="empty"):
        find_sites(llama, [])


def test_a_name_like_nothing_lists_what_there_is(llama: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"modules end in: .*down_proj"):
        find_sites(llama, ["zzzzzz"])


def test_a_parameter_is_found_by_its_path(llama: nn.Module) -> None:
    (site,) = find_sites(llama, ["model.layers.0.input_layernorm.weight"])
    assert isinstance(site, ParameterSite) and site.shape == (16,)
    sites = find_sites(make_model("linear"), ["up.bias"])
    assert [s.path for s in sites] == ["layers.0.up.bias", "layers.1.up.bias"]


def test_canonical_orientation_is_out_by_in_whatever_the_module_stores() -> None:
    (first, *_), stored = find_sites(make_model("transposed-linear")), "layers.0.up"
    assert isinstance(first, TransposedLinearSite) and first.path == stored
    assert first.shape == (16, 12) == tuple(first.weight().shape)
    x, weight = torch.randn(3, 12), first.weight()
    torch.testing.assert_close(first.apply(x, weight) + first.bias(), first.forward(x))
    assert torch.equal(first.replacement(weight), first.base.weight)


@pytest.mark.parametrize("kind", ["linear", "transposed-linear", "conv", "embedding"])
def test_apply_and_apply_low_rank_are_the_bases_own_map(kind: str) -> None:
    model = make_model(kind, torch.float64)
    target = {"conv": "all-conv", "embedding": "embeddings"}.get(kind, "all-linear")
    for site in find_sites(model, target):
        x = {
            "conv": torch.randn(2, site.base.weight.shape[1], 5, 5, dtype=torch.float64),
            "embedding": torch.tensor([[1, 3], [0, 2]]),
        }.get(kind, torch.randn(2, 3, site.in_features, dtype=torch.float64))
        y = site.forward(x)
        bias = site.bias()
        if bias is not None:
            y = y - (bias[:, None, None] if kind == "conv" else bias)
        torch.testing.assert_close(site.apply(x, site.weight()), y)
        A = torch.randn(2, site.in_features, dtype=torch.float64)
        B = torch.randn(site.out_features, 2, dtype=torch.float64)
        torch.testing.assert_close(site.apply_low_rank(x, A, B), site.apply(x, B @ A))


def test_strided_padded_grouped_and_one_dimensional_convolutions() -> None:
    layers = [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 5, padding=2, padding_mode="reflect"), (2, 4, 11)),
    ]
    for layer, shape in layers:
        model = nn.Sequential(layer).double()
        x = torch.randn(shape, dtype=torch.float64)
        (site,) = find_sites(model, "all-conv")
        bias = layer.bias.reshape(-1, *[1] * (x.dim() - 2))
        torch.testing.assert_close(site.apply(x, site.weight()) + bias, layer(x))
        A = torch.randn(2, site.in_features, dtype=torch.float64)
        B = torch.randn(6, 2, dtype=torch.float64)
        torch.testing.assert_close(site.apply_low_rank(x, A, B), site.apply(x, B @ A))


def test_what_plait_added_is_never_a_target(llama: nn.Module) -> None:
    before = paths(llama, "all-linear")
    plait.attach(llama, "lora", rank=2, name="a")
    assert paths(llama, "all-linear") == before
    plait.attach(llama, "lora", rank=2, name="b", targets=r".*_proj")
    assert plait.adapters(llama)["b"].deltas.keys() == plait.adapters(llama)["a"].deltas.keys()


def test_find_blocks_takes_the_longest_list_of_one_class() -> None:
    model = nn.Module()
    model.small = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), *model.blocks])
    assert [p for p, _ in find_blocks(model)] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_linear_of_another_class_is_a_site_by_its_sizes() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 3, 4
            self.register_buffer("codes", torch.randint(4, (4, 3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.codes.float().t()

    model = nn.Sequential(Quantised())
    (site,) = find_sites(model)
    assert type(site) is LinearSite and site.shape == (4, 3)
    x = torch.randn(2, 3)
    base = model(x)
    adapter = plait.attach(model, "lora", rank=2)
    assert torch.equal(model(x), base)
    delta = adapter.deltas["0"]
    nn.init.normal_(delta.B)
    torch.testing.assert_close(model(x), base + x @ delta.dense().t())
