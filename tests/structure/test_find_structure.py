"""Groups against tables written by hand, and what cannot be followed against its reasons."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.errors import PlaitError
from plait.structure import Group, Masks, find_structure
from tiny_language_model import tiny_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}


def table(group: Group, below: str = "") -> set[tuple[str, int, int, int, bool]]:
    return {(s.tensor.removeprefix(below), s.dim, s.before, s.after, s.reads) for s in group.slots}


def qwen2(attention: str) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_heads_and_channels_of_grouped_query_attention(attention: str) -> None:
    groups = find_structure(qwen2(attention)).groups
    below = "model.layers.1.self_attn."
    heads = groups["model.layers.1.self_attn"]
    assert heads.size == 2 and heads.separable and heads.blocks == {1}
    assert table(heads, below) == {
        ("q_proj.weight", 0, 1, 16, False),
        ("q_proj.bias", 0, 1, 16, False),
        ("k_proj.weight", 0, 1, 8, False),
        ("k_proj.bias", 0, 1, 8, False),
        ("v_proj.weight", 0, 1, 8, False),
        ("v_proj.bias", 0, 1, 8, False),
        ("o_proj.weight", 1, 1, 16, True),
    }
    queries = groups["model.layers.1.self_attn:2"]
    assert queries.size == 2 and not queries.whole
    assert table(queries, below) == {
        ("q_proj.weight", 0, 2, 8, False),
        ("q_proj.bias", 0, 2, 8, False),
        ("o_proj.weight", 1, 2, 8, True),
    }
    assert table(groups["model.layers.0.mlp"], "model.layers.0.mlp.") == {
        ("gate_proj.weight", 0, 1, 1, False),
        ("up_proj.weight", 0, 1, 1, False),
        ("down_proj.weight", 1, 1, 1, True),
    }


def test_the_width_of_the_residual_stream_is_one_group_through_all_blocks() -> None:
    model = qwen2("sdpa")
    (stream,) = (g for g in find_structure(model).groups.values() if not g.inner)
    assert stream.size == 32 and stream.blocks == {0, 1} and "mean" in stream.mixed
    found = {(s.tensor, s.dim) for s in stream.slots}
    names = dict(model.named_parameters())  # the tied head is the embedding itself
    for name, parameter in names.items():
        inside = any(p in name for p in ("q_", "k_", "v_", "gate", "up_"))
        if name.endswith("bias"):
            continue
        expected = 0 if parameter.dim() == 1 or not (inside or "embed" in name) else 1
        assert (name, expected) in found, name
    assert len(found) == sum(not n.endswith("bias") for n in names)


def test_fused_projections_of_gpt2_that_stores_its_weights_turned() -> None:
    groups = find_structure(tiny_model("gpt2")).groups
    below = "transformer.h.0."
    assert table(groups["transformer.h.0.attn"], below) == {
        ("attn.c_attn.weight", 1, 3, 8, False),
        ("attn.c_attn.bias", 0, 3, 8, False),
        ("attn.c_proj.weight", 0, 1, 8, True),
    }
    channels = groups["transformer.h.0.attn:2"]  # of queries, keys and values at once
    assert "compared" in channels.mixed and not channels.separable
    assert groups["transformer.h.0.attn"].separable
    assert table(groups["transformer.h.0.mlp"], below) == {
        ("mlp.c_fc.weight", 1, 1, 1, False),
        ("mlp.c_fc.bias", 0, 1, 1, False),
        ("mlp.c_proj.weight", 0, 1, 1, True),
    }


def test_heads_that_differ_by_a_constant_stay() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60)
    groups = find_structure(BloomForCausalLM(config).eval()).groups.values()
    assert {g.name for g in groups if g.separable} == {f"transformer.h.{i}.mlp" for i in (0, 1)}


def test_an_encoder_whose_width_is_its_output() -> None:
    from transformers import BertConfig, BertModel

    structure = find_structure(BertModel(BertConfig(**SMALL, num_attention_heads=4)).eval())
    assert all(group.inner for group in structure.groups.values())
    names = ("query", "key", "value")
    assert table(structure.groups["encoder.layer.0.attention"], "encoder.layer.0.attention.") == {
        *((f"self.{n}.{leaf}", 0, 1, 8, False) for n in names for leaf in ("weight", "bias")),
        ("output.dense.weight", 1, 1, 8, True),
    }
    assert structure.groups["encoder.layer.0"].size == 48
    why = structure.refused["encoder.layer.0.output.dense.weight[0]"]
    assert why == "it is the width of an output"


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.max_pool2d(self.second(x), 2).flatten(1))


def test_channels_of_convolutions_reach_through_norms_and_a_flattening() -> None:
    groups = find_structure(Convolutions().eval(), {"x": torch.randn(2, 3, 10, 10)}).groups
    tables = [table(group) for group in groups.values()]
    norm = {(f"norm.{n}", 0, 1, 1, False) for n in ("weight", "bias", "running_mean")}
    assert tables == [
        {
            ("first.weight", 0, 1, 1, False),
            ("first.bias", 0, 1, 1, False),
            *norm,
            ("norm.running_var", 0, 1, 1, False),
            ("second.weight", 1, 1, 1, True),
        },
        {
            ("second.weight", 0, 1, 1, False),
            ("second.bias", 0, 1, 1, False),
            ("head.weight", 1, 1, 9, True),
        },
    ]


class Odd(nn.Module):
    """A hidden layer of 12 whose channels `mangle` does something to."""

    def __init__(self, mangle, out: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.mangle = nn.Linear(6, 12), nn.Linear(out, 4), mangle

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mangle(self.up(x)))


def gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


@pytest.mark.parametrize(
    ("mangle", "out", "why"),
    [
        (lambda x: torch.fft.fft(x).real, 12, "cannot be followed"),
        (lambda x: x.cumsum(-1), 12, "order a meaning"),
        (lambda x: x[..., ::2], 6, "skips entries"),
        (lambda x: x[..., torch.arange(11, -1, -1)], 12, "picked from by an index"),
        (lambda x: x * torch.arange(12.0), 12, "no weight"),
        (lambda x: torch.cat([x[..., :5] * 2, x[..., 5:]], -1), 12, "a part of it"),
        (lambda x: x.sort(-1).values, 12, "order a meaning"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_a_reason(mangle, out: int, why: str) -> None:
    structure = find_structure(Odd(mangle, out), {"x": torch.randn(3, 6)})
    assert structure.groups == {}
    assert why in structure.refused["up.weight[0]"]


def test_a_gate_and_its_values_in_one_layer_go_together() -> None:
    structure = find_structure(Odd(gated, 6), {"x": torch.randn(3, 6)})
    (group,) = structure.groups.values()
    assert group.size == 6
    assert table(group) == {
        ("up.weight", 0, 2, 1, False),
        ("up.bias", 0, 2, 1, False),
        ("down.weight", 1, 1, 1, True),
    }


def test_a_model_that_does_not_say_what_it_reads() -> None:
    with pytest.raises(PlaitError, match="pass data="):
        find_structure(Odd(gated, 6))
    with pytest.raises(PlaitError, match="does not run on this batch"):
        find_structure(Odd(gated, 6), {"x": torch.randn(3, 7)})


def test_adapters_are_left_out_and_the_model_is_as_it_was() -> None:
    model = tiny_model()
    names = list(find_structure(model).groups)
    plait.attach(model, "lora", name="a", rank=2)
    model.train()
    assert list(find_structure(model).groups) == names
    assert model.training and plait.adapters(model)["a"].state.active == {"a": 1.0}


def test_precision_does_not_matter() -> None:
    model = tiny_model("gpt2")
    expected = find_structure(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_structure(model).groups == expected.groups
    assert find_structure(model.bfloat16()).groups == expected.groups


def test_a_mask_is_what_zero_columns_of_the_readers_are() -> None:
    model = tiny_model()
    structure = find_structure(model)
    tokens = torch.arange(20).reshape(2, 10)
    kept = {
        "model.layers.0.self_attn": torch.tensor([True, False]),
        "model.layers.1.mlp": torch.arange(48) % 3 > 0,
        "model.layers.1.self_attn:2": torch.tensor([False, True]),
    }
    with torch.no_grad():
        before = model(tokens).logits
        with Masks(model, structure, kept) as masks:
            masked = model(tokens).logits
            masks.set({"model.layers.1.mlp": torch.ones(48, dtype=torch.bool)})
            assert not torch.equal(model(tokens).logits, masked)
        assert torch.equal(model(tokens).logits, before)
        width = 16
        model.model.layers[0].self_attn.o_proj.weight[:, width:] = 0
        model.model.layers[1].mlp.down_proj.weight[:, ::3] = 0
        per_head = model.model.layers[1].self_attn.o_proj.weight.view(32, 2, 2, 8)
        per_head[:, :, 0] = 0
        torch.testing.assert_close(model(tokens).logits, masked, rtol=1e-6, atol=1e-6)
