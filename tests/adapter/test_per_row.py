"""per_row: another adapter for every row of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import plait
from plait import PlaitError
from plait.testing import make_model, perturb, tiny_llama

ROWS = ["a", "b", None, "a", "c"]


@pytest.fixture
def model() -> nn.Module:
    model = make_model("linear")
    for seed, (name, more) in enumerate(
        [("a", {}), ("b", {"targets": ["up"], "rank": 3}), ("c", {"targets": ["head"]})], 1
    ):
        given = {"rank": 2, **more}
        perturb(plait.attach(model, "lora", name=name, seed=seed, activate=False, **given), seed)
    return model


def x() -> Tensor:
    return torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0))


def one_by_one(model: nn.Module, rows: list[str | None], x: Tensor) -> Tensor:
    found = []
    for i, name in enumerate(rows):
        plait.activate(model, [name] if name else [])
        found.append(model(x[i : i + 1]).logits)
    return torch.cat(found)


def test_rows_with_different_sites_and_ranks_equal_one_by_one(model: nn.Module) -> None:
    with plait.per_row(model, ROWS):
        together = model(x()).logits
    torch.testing.assert_close(together, one_by_one(model, ROWS, x()), atol=1e-5, rtol=1e-5)


def test_base_rows_are_the_bases(model: nn.Module) -> None:
    base = make_model("linear")(x()).logits
    with plait.per_row(model, [None] * 5):
        assert torch.equal(model(x()).logits, base)
    with plait.per_row(model, ROWS):
        out = model(x()).logits
    assert torch.equal(out[2], base[2])


def test_what_was_active_is_active_again_also_after_an_error(model: nn.Module) -> None:
    plait.activate(model, {"a": 0.5, "b": 2.0})
    before = model(x()).logits
    with plait.per_row(model, ROWS):
        model(x())
    assert torch.equal(model(x()).logits, before)
    with pytest.raises(PlaitError, match=r"names 5 rows.*has 2"), plait.per_row(model, ROWS):
        model(x()[:2])
    assert torch.equal(model(x()).logits, before)


def test_active_adapters_do_not_leak_into_rows(model: nn.Module) -> None:
    wanted = one_by_one(model, ROWS, x())
    plait.activate(model, {"a": 3.0, "c": 1.0})
    with plait.per_row(model, ROWS):
        torch.testing.assert_close(model(x()).logits, wanted, atol=1e-5, rtol=1e-5)


def test_an_unknown_row_names_the_nearest_and_changes_nothing(model: nn.Module) -> None:
    before = model(x()).logits
    perturb(plait.attach(model, "lora", name="french", activate=False))
    with pytest.raises(PlaitError, match="did you mean 'french'"), plait.per_row(model, ["frensh"]):
        pass
    assert torch.equal(model(x()).logits, before)


def test_gradients_go_only_to_the_adapters_named(model: nn.Module) -> None:
    with plait.per_row(model, ["a", None, "a", None, None]):
        model(x()).logits.square().sum().backward()
    grads = {
        name: [p.grad is not None for p in adapter.parameters()]
        for name, adapter in plait.adapters(model).items()
    }
    assert all(grads["a"]) and not any(grads["b"]) and not any(grads["c"])


def test_generation_with_an_adapter_per_row_equals_single_generation() -> None:
    model = tiny_llama(use_cache=True).eval()
    for seed, name in enumerate("ab", 1):
        perturb(
            plait.attach(model, "lora", name=name, seed=seed, rank=4, activate=False), seed, 0.5
        )
    prompt = torch.arange(6).reshape(2, 3)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def generate(tokens: Tensor) -> Tensor:
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)

    with plait.per_row(model, ["a", "b"]):
        together = generate(prompt)
    for i, name in enumerate("ab"):
        plait.activate(model, name)
        assert torch.equal(together[i : i + 1], generate(prompt[i : i + 1]))
    assert not torch.equal(together[0, 3:], together[1, 3:])
