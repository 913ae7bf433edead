"""extract: against float64 SVDs of tuned - base, and the fine-tune's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.errors import PlaitError
from tiny_language_model import tiny_model

TOKENS = torch.arange(60).reshape(2, 30) % 258


def tuned_from(model: nn.Module, rank: int, noise: float = 0.0, vectors: bool = True) -> nn.Module:
    """A fine-tune whose matrices moved by rank `rank` plus noise, its vectors freely."""
    import copy

    tuned = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(7)
    for parameter in tuned.parameters():
        if parameter.dim() == 1:
            move = 0.05 * torch.randn(parameter.shape, generator=draw) * vectors
        else:
            rows, columns = parameter.shape[0], parameter[0].numel()
            left = torch.randn(rows, rank, generator=draw) * 0.05
            move = left @ torch.randn(rank, columns, generator=draw)
            move = move + noise * torch.randn(rows, columns, generator=draw)
        parameter.data += move.reshape(parameter.shape)
    return tuned


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def changes(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    before, after = base.state_dict(), tuned.state_dict()
    return {n: after[n].double() - before[n].double() for n in before}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_change_of_that_rank_comes_back_whole(kind: str) -> None:
    """GPT-2 stores W transposed and ties its head to the embedding."""
    base = tiny_model(kind)
    tuned = tuned_from(base, rank=3)
    adapter = plait.extract(base, tuned, rank=3)
    facts = adapter.info["extract"]
    assert max(facts["errors"].values()) < 1e-5 and facts["held"] > 1 - 1e-9
    assert facts["left_out"] == {}
    expected = logits(tuned)
    plait.adapter.install(base, plait.adapter.bind(adapter, base))
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


def test_the_error_is_that_of_the_best_approximation() -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=3, noise=0.02)
    adapter = plait.extract(base, tuned, rank=4, svd="exact")
    near = plait.extract(base, tuned, rank=4)
    for name, change in changes(base, tuned).items():
        if change.dim() != 2:
            continue
        path = name.removesuffix(".weight")
        S = torch.linalg.svdvals(change)
        best = float((S[4:].square().sum() / S.square().sum()).sqrt())
        errors = adapter.info["extract"]["errors"]
        assert errors[path] == pytest.approx(best, rel=1e-4)
        assert best <= near.info["extract"]["errors"][path] * (1 + 1e-4) < 1.05 * best
        dense = adapter.deltas[path].dense().detach().double()
        if change.shape != dense.shape:
            dense = dense.mT
        assert float((change - dense).norm() / change.norm()) == pytest.approx(best, rel=1e-4)


def test_a_share_of_energy_takes_the_fewest_components_that_hold_it() -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=3, noise=0.02)
    adapter = plait.extract(base, tuned, energy=0.97, svd="exact")
    ranks = set()
    for name, change in changes(base, tuned).items():
        if change.dim() != 2:
            continue
        held = torch.linalg.svdvals(change).square().cumsum(0)
        fewest = int((held < 0.97 * held[-1]).sum()) + 1
        ranks.add(fewest)
        assert adapter.deltas[name.removesuffix(".weight")].rank == fewest
    assert len(ranks) > 1


def test_a_budget_goes_where_it_holds_most() -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=2)
    loud = tuned.model.layers[0].mlp.up_proj.weight
    loud.data += torch.randn(loud.shape, generator=torch.Generator().manual_seed(1))
    budget = 3000
    adapter = plait.extract(base, tuned, budget=budget, rest="drop")
    assert budget - 600 < adapter.num_parameters() <= budget
    ranks = {path: delta.rank for path, delta in adapter.deltas.items()}
    assert max(ranks, key=ranks.__getitem__) == "model.layers.0.mlp.up_proj"
    even = plait.extract(base, tuned, rank=1, rest="drop")
    assert even.num_parameters() <= adapter.num_parameters() * 1.2
    assert adapter.info["extract"]["held"] > even.info["extract"]["held"]


def test_checkpoints_are_read_from_their_folders_and_the_adapter_from_its_file(
    tmp_path: Path,
) -> None:
    base = tiny_model("gpt2")
    tuned = tuned_from(base, rank=2)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    adapter = plait.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    adapter.save(tmp_path / "adapter")
    expected = logits(tuned)
    plait.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


def test_state_dicts_go_by_names_and_peft_takes_what_has_no_vectors(tmp_path: Path) -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=2, vectors=False)
    adapter = plait.extract(base.state_dict(), tuned.state_dict(), rank=2, name="ex")
    assert adapter.deltas["model.embed_tokens"].site.kind == "embedding"
    adapter.save(tmp_path / "peft", format="peft")
    expected = logits(tuned)
    plait.load(base, tmp_path / "peft")
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


def test_vectors_are_kept_in_full_or_named_with_their_norms() -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=2)
    moved = {n: c for n, c in changes(base, tuned).items() if c.dim() == 1}
    kept = plait.extract(base, tuned, rank=2, dtype=torch.float16)
    assert kept.info["extract"]["kept_dense"] == sorted(moved)
    for name, change in moved.items():
        torch.testing.assert_close(kept.deltas[name].dense().double(), change, rtol=1e-6, atol=1e-7)
    dropped = plait.extract(base, tuned, rank=2, rest="drop").info["extract"]
    expected = {name: pytest.approx(float(c.norm()), rel=1e-5) for name, c in moved.items()}
    assert dropped["left_out"] == expected
    everything = sum(float(c.square().sum()) for c in changes(base, tuned).values())
    lost = sum(float(c.square().sum()) for c in moved.values())
    assert dropped["held"] == pytest.approx(1 - lost / everything, abs=1e-6)


def test_only_what_changed_and_was_asked_for() -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=2)
    for name, parameter in tuned.named_parameters():
        if "layers.1" in name:
            parameter.data = base.get_parameter(name).data.clone()
    adapter = plait.extract(base, tuned, rank=2, targets=["q_proj", "v_proj"])
    assert set(adapter.deltas) == {f"model.layers.0.self_attn.{n}_proj" for n in "qv"}
    assert "model.layers.0.self_attn.k_proj.weight" in adapter.info["extract"]["left_out"]


def test_convolutions_and_stacked_experts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.experts = nn.Parameter(torch.randn(4, 6, 5))

    base = Net()
    tuned = tuned_from(base, rank=1, vectors=False)
    left, right = torch.randn(4, 6, 1), torch.randn(4, 1, 5)
    tuned.experts.data = base.experts.data + left @ right
    adapter = plait.extract(base, tuned, rank=1)
    for path, change in (
        ("conv", (tuned.conv.weight - base.conv.weight).flatten(1)),
        ("experts", left @ right),
    ):
        torch.testing.assert_close(adapter.deltas[path].dense(), change.detach(), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_named() -> None:
    base = tiny_model()
    tuned = tuned_from(base, rank=1)
    with pytest.raises(PlaitError, match="changes nothing"):
        plait.extract(base, base)
    smaller = {n: t for n, t in tuned.state_dict().items() if "q_proj" not in n}
    with pytest.raises(
        PlaitError, match=r"only the base has 'model\.layers\.\d\.self_attn\.q_proj"
    ):
        plait.extract(base, smaller)
    wider = tuned.state_dict() | {"model.embed_tokens.weight": torch.zeros(260, 32)}
    with pytest.raises(PlaitError, match=r"\[258, 32\].*\[260, 32\]"):
        plait.extract(base, wider)
    with pytest.raises(PlaitError, match="not rank and energy"):
        plait.extract(base, tuned, rank=2, energy=0.9)
    broken = {n: t.clone() for n, t in tuned.state_dict().items()}
    broken["lm_head.weight"][0, 0] = float("nan")
    with pytest.raises(PlaitError, match=r"lm_head\.weight.*NaN"):
        plait.extract(base, broken)


def test_a_tied_weight_is_stored_once_and_read_for_both_sites(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors import safe_open

    base = tiny_model("gpt2")
    tuned = tuned_from(base, rank=2, vectors=False)
    adapter = plait.extract(base, tuned, rank=2)
    assert {"lm_head", "transformer.wte"} <= set(adapter.deltas)
    adapter.save(tmp_path / "own")
    with safe_open(tmp_path / "own" / "adapter.safetensors", "pt") as file:
        assert not any(name.startswith("lm_head") for name in file.keys())  # noqa: SIM118
    again = plait.read_adapter(tmp_path / "own")
    assert list(again.deltas) == list(adapter.deltas)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    expected = logits(tuned)
    adapter.save(tmp_path / "peft", format="peft")
    peft = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "peft")
    torch.testing.assert_close(logits(peft), expected, rtol=1e-4, atol=1e-4)
    plait.load(base, tmp_path / "own")
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_went_its_own_way_is_stored_apart(tmp_path: Path) -> None:
    base = tiny_model("gpt2")
    adapter = plait.extract(base, tuned_from(base, rank=2), rank=2)
    adapter.deltas["lm_head"].A.data[0, 0] += 1e-3
    adapter.save(tmp_path / "own")
    again = plait.read_adapter(tmp_path / "own").state_dict()
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(again[name], tensor), name
    plain = plait.attach(base, "lora", targets=["wte", "lm_head"], rank=2)  # A and B are zeros
    plain.save(tmp_path / "plain")
    assert '"version": 1' in (tmp_path / "plain" / "plait.json").read_text()


def test_a_file_whose_twin_is_missing_is_refused(tmp_path: Path) -> None:
    base = tiny_model("gpt2")
    plait.extract(base, tuned_from(base, rank=2), rank=2).save(tmp_path / "own")
    file = tmp_path / "own" / "plait.json"
    text = file.read_text()
    file.write_text(text.replace('"same":{"lm_head":"transformer.wte"', '"same":{"lm_head":"wte"'))
    if file.read_text() == text:
        file.write_text(text.replace('"lm_head": "transformer.wte"', '"lm_head": "wte"'))
    assert file.read_text() != text
    with pytest.raises(PlaitError, match="cannot share the pair"):
        plait.read_adapter(tmp_path / "own")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert", "gpt2"])
def test_the_source_says_what_the_model_says(kind: str, tied: bool, tmp_path: Path) -> None:
    """Sites, orders and ties as the built model has them; GPT-2's layers are not plain."""
    import transformers

    from plait.compression.source import places_from_source
    from plait.compression.weights import Places, open_weights, skeleton

    cls = {
        "llama": transformers.LlamaForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "bert": transformers.BertModel,
        "gpt2": transformers.GPT2LMHeadModel,
    }[kind]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    config = cls.config_class(**small, num_attention_heads=4, tie_word_embeddings=tied)
    cls(config).save_pretrained(tmp_path)
    with open_weights(tmp_path, "the base") as weights:
        told = places_from_source(tmp_path, weights.shapes)
        if kind == "gpt2":
            assert told is None
            return
        assert told is not None
        exact = Places(skeleton(tmp_path))
        for name, shape in weights.shapes.items():
            ours, theirs = told.sites(name, shape), exact.sites(name, shape)
            assert [(type(s), s.path, s.shape) for s in ours] == [
                (type(s), s.path, s.shape) for s in theirs
            ]
        if kind != "bert":
            count = len(told.sites("model.embed_tokens.weight", (40, 16)))
            assert count == (2 if tied else 1)
            same = told.key("lm_head.weight") == told.key("model.embed_tokens.weight")
            assert same == tied


def test_a_source_that_leaves_a_tensor_open_is_not_believed(tmp_path: Path) -> None:
    from plait.compression.source import places_from_source
    from plait.compression.weights import open_weights

    tiny_model().save_pretrained(tmp_path)
    with open_weights(tmp_path, "the base") as weights:
        shapes = dict(weights.shapes)
    assert places_from_source(tmp_path, shapes) is not None
    assert places_from_source(tmp_path, shapes | {"model.gate.weight": (4, 4)}) is None
    assert places_from_source(tmp_path, shapes | {"layers.0.mlp.up_proj.weight": (4, 4)}) is None
    assert places_from_source(tmp_path / "none", shapes) is None
