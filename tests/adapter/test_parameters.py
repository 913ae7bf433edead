"""Parameter sites: packed experts of a mixture, biases, norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import plait
from plait import PlaitError
from plait.testing import make_model, perturb, tiny_llama


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    settings = MixtralConfig(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(settings).eval()


def tokens() -> Tensor:
    return torch.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return mixtral()


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base)


def test_packed_experts_get_a_pair_each(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2, targets="experts", seed=1)
    shapes = {p: d.site.shape for p, d in adapter.deltas.items()}
    assert shapes == {
        f"model.layers.{i}.mlp.experts.{n}": s
        for i in range(2)
        for n, s in (("gate_up_proj", (4, 24, 16)), ("down_proj", (4, 16, 12)))
    }
    assert adapter.num_parameters() == 2 * 4 * 2 * ((24 + 16) + (16 + 12))
    delta = adapter.deltas["model.layers.0.mlp.experts.down_proj"]
    perturb(adapter)
    for e in range(4):
        wanted = delta.scaling * delta.B[e] @ delta.A[e]
        torch.testing.assert_close(delta.dense()[e], wanted)


def test_the_model_equals_one_with_the_experts_changed(base: nn.Module, model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2, targets="experts", seed=1)
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)
    perturb(adapter, size=0.3)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            changed.get_parameter(path).add_(delta.dense())
    wanted = changed(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, base(tokens()).logits, atol=1e-3)
    plait.fuse(model)
    torch.testing.assert_close(model(tokens()).logits, wanted, atol=1e-5, rtol=1e-5)
    plait.unfuse(model)
    plait.detach(model)
    assert torch.equal(model(tokens()).logits, base(tokens()).logits)


def test_experts_and_attention_train_together(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2, targets=["experts", "q_proj"], seed=1)
    assert len(adapter.deltas) == 6
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-1)
    losses = []
    for _ in range(20):
        out = model(tokens(), labels=tokens()).loss
        losses.append(float(out.detach()))
        out.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_outside_its_forward_the_parameter_is_the_bases(model: nn.Module) -> None:
    experts = model.model.layers[0].mlp.experts
    stored = experts.down_proj
    adapter = plait.attach(model, "lora", rank=2, targets="experts", seed=1)
    perturb(adapter)
    model(tokens())
    assert experts.down_proj is stored
    assert dict(experts.named_parameters(recurse=False))["down_proj"] is stored


def test_two_adapters_on_one_module_and_different_parameters() -> None:
    model = make_model("parameter")
    x = torch.randn(2, 3, 12)
    a = plait.attach(model, "lora", rank=2, targets=["experts.up"], name="a", seed=1)
    b = plait.attach(model, "lora", rank=2, targets=["experts.down"], name="b", seed=2)
    perturb(a, 1)
    perturb(b, 2)
    outs = {}
    for active in ("a", "b", "ab"):
        plait.activate(model, dict.fromkeys(active, 1.0))
        changed = make_model("parameter")
        with torch.no_grad():
            for adapter in (a, b):
                if adapter.name in active:
                    ((path, delta),) = adapter.deltas.items()
                    changed.get_parameter(path).add_(delta.dense())
        outs[active] = model(x).logits
        torch.testing.assert_close(outs[active], changed(x).logits, atol=1e-5, rtol=1e-5)
    plait.detach(model, "a")
    assert torch.equal(model(x).logits, outs["b"])
    plait.detach(model)
    assert torch.equal(model(x).logits, make_model("parameter")(x).logits)
    assert type(model.experts).__name__ == "PackedExperts"


class BiasShift(plait.Delta):
    """What a bias-tuning method would be: a change of any parameter, by name."""

    kinds = frozenset({"parameter"})

    def build(self) -> None:
        self.parameter("shift", *self.site.shape)

    def dense(self) -> Tensor:
        return self.get_parameter("shift")


BITFIT = plait.Method(
    "bias-shift-for-tests", "Shift", "none", "parameterisation", delta=BiasShift, targets=["bias"]
)


def test_biases_are_sites_too() -> None:
    model = make_model("linear")
    x = torch.randn(4, 12)
    adapter = plait.attach(model, BITFIT, targets=["up.bias", "head.bias"], seed=1)
    assert set(adapter.deltas) == {"layers.0.up.bias", "layers.1.up.bias", "head.bias"}
    perturb(adapter)
    changed = make_model("linear")
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            changed.get_parameter(path).add_(delta.dense())
    torch.testing.assert_close(model(x).logits, changed(x).logits, atol=1e-6, rtol=1e-5)
    model(x).logits.sum().backward()
    assert adapter.deltas["head.bias"].shift.grad is not None


def test_a_bias_change_and_a_lora_live_on_one_linear() -> None:
    model = make_model("linear")
    x = torch.randn(4, 12)
    shift = plait.attach(model, BITFIT, targets=["head.bias"], name="shift", seed=1)
    lora = plait.attach(model, "lora", rank=2, targets=["head"], name="lora", seed=2)
    perturb(shift)
    perturb(lora)
    plait.activate(model, ["shift", "lora"])
    changed = make_model("linear")
    with torch.no_grad():
        changed.head.weight.add_(lora.deltas["head"].dense())
        changed.head.bias.add_(shift.deltas["head.bias"].dense())
    torch.testing.assert_close(model(x).logits, changed(x).logits, atol=1e-5, rtol=1e-5)
    plait.fuse(model)
    torch.testing.assert_close(model(x).logits, changed(x).logits, atol=1e-5, rtol=1e-5)


def test_norms_are_sites_too() -> None:
    model = tiny_llama()
    base = model(tokens()).logits
    targets = [f"{n}_layernorm.weight" for n in ("input", "post_attention")]
    adapter = plait.attach(model, BITFIT, targets=targets, seed=1)
    assert len(adapter.deltas) == 4 and torch.equal(model(tokens()).logits, base)
    perturb(adapter)
    assert not torch.equal(model(tokens()).logits, base)


def test_single_rows_cannot_change_a_weight_of_the_whole_batch(model: nn.Module) -> None:
    plait.attach(model, "lora", rank=2, targets="experts", name="a")
    with (
        pytest.raises(PlaitError, match=r"whole batch.*to_lora"),
        plait.per_row(model, ["a", None]),
    ):
        pass
