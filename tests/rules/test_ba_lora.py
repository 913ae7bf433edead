"""BA-LoRA: the three losses against their formulas, and where their logits come from."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import plait
from plait.rules import _output_losses as losses
from plait.rules.ba_lora import BaLora
from plait.testing.models import SUBJECTS, make_model, tiny_llama

F64 = torch.float64


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64).to(dtype)


def top_share(z: Tensor, k: int) -> Tensor:
    s = torch.linalg.svdvals(z)
    return -s[:k].sum() / s.sum()


def test_staying_near_costs_nothing_at_the_reference_and_is_the_formula_elsewhere() -> None:
    z, other = logits(6, 5), logits(6, 5, seed=1)
    assert float(losses.distance(z, z)) == float(losses.divergence(z, z)) == 0.0
    by_hand = torch.stack([(a / a.norm() - b / b.norm()) ** 2 for a, b in zip(z, other)]).mean()  # noqa: B905
    torch.testing.assert_close(losses.distance(z, other), by_hand)
    p, q = other.softmax(-1), z.softmax(-1)
    torch.testing.assert_close(losses.divergence(z, other), (p * (p / q).log()).sum(-1).mean())


def test_covariances_are_those_off_the_diagonal_and_quartic_in_the_logits() -> None:
    z = logits(9, 4)
    matrix = torch.cov(z.T)
    want = sum(float(matrix[i, j]) ** 2 for i in range(4) for j in range(4) if i != j) / 4
    assert float(losses.covariance(z)) == pytest.approx(want)
    assert float(losses.covariance(3 * z)) == pytest.approx(81 * want)
    centred = z - z.mean(0)
    decorrelated = torch.linalg.qr(centred).Q  # columns stay orthogonal to 1
    assert float(losses.covariance(decorrelated + 2)) == pytest.approx(0, abs=1e-20)
    alone = logits(1, 4).requires_grad_()
    losses.covariance(alone).backward()
    assert torch.equal(alone.grad, torch.zeros(1, 4, dtype=F64))


def test_entropy_is_the_distribution_s_and_largest_where_all_is_alike() -> None:
    z = logits(7, 12)
    want = -torch.distributions.Categorical(logits=z).entropy().mean()
    torch.testing.assert_close(losses.negative_entropy(z), want)
    even = losses.negative_entropy(torch.full((3, 12), 2.0, dtype=F64))
    assert float(even) == pytest.approx(-math.log(12))
    assert float(even) < float(losses.negative_entropy(z))


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (6, 6)])
def test_the_share_of_singular_values_and_its_gradient(shape: tuple[int, int]) -> None:
    z = logits(*shape).requires_grad_()
    want = top_share(z, 2)
    (expected,) = torch.autograd.grad(want, z)
    found = losses.concentration(z, 2, 512)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], expected, atol=1e-10, rtol=1e-7)
    assert -1 <= float(found.detach()) <= -2 / min(shape)


def test_few_directions_are_all_there_is() -> None:
    thin = logits(8, 2) @ logits(2, 40, seed=1)
    assert float(losses.concentration(thin, 2, 512)) == pytest.approx(-1, abs=1e-9)
    assert float(losses.concentration(thin.float(), 2, 512)) == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize(
    "z",
    [
        torch.eye(6),
        torch.zeros(4, 6),
        torch.ones(4, 6),
        torch.full((4, 6), 3e38),
        1e-30 * logits(4, 6),
    ],
    ids=["equal", "zero", "rank one", "overflow", "tiny"],
)
def test_gradients_are_finite_where_singular_values_are_not_distinct(z: Tensor) -> None:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.concentration(z, 2, 512), z)
    assert torch.isfinite(gradient).all()


def test_logits_that_are_not_finite_do_not_end_the_run() -> None:
    assert losses.concentration(torch.full((3, 5), torch.nan), 2, 512).ndim == 0


def test_more_rows_than_allowed_are_a_spaced_part() -> None:
    z = logits(40, 8)
    torch.testing.assert_close(losses.concentration(z, 2, 4), top_share(z[[0, 13, 26, 39]], 2))


def test_blocks_give_the_value_and_gradient_of_the_whole(monkeypatch) -> None:
    def found() -> list[Tensor]:
        z, other = logits(11, 6).requires_grad_(), logits(11, 6, seed=1)
        terms = (
            losses.divergence(z, other),
            losses.negative_entropy(z),
            losses.concentration(z, 2, 512),
        )
        return [t.detach() for t in terms] + [torch.autograd.grad(t, z)[0] for t in terms]

    whole = found()
    monkeypatch.setattr(losses, "_BLOCK", 13)
    for one, two in zip(whole, found(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_sure_answers_neither_underflow_nor_overflow(dtype) -> None:
    z = (3000 * logits(6, 9)).to(dtype).requires_grad_()
    other = (3000 * logits(6, 9, seed=1)).to(dtype)
    terms = [losses.distance(z, other), losses.divergence(z, other), losses.negative_entropy(z)]
    total = sum(terms) + losses.concentration(z, 2, 512)
    assert total.dtype == torch.float32 and torch.isfinite(total)
    total.backward()
    assert torch.isfinite(z.grad).all()


# -- in a run -------------------------------------------------------------------------------------


def language_model(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model = tiny_llama().double().requires_grad_(False).train()
    ids = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids.clone()}


def stack(model: nn.Module, **weights) -> plait.RuleStack:
    off = {"consistency": 0.0, "diversity": 0.0, "svd": 0.0}
    return plait.RuleStack(model, [BaLora(**{**off, **weights})], lr=1e-2)


def moved(model: nn.Module, run: plait.RuleStack, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    run.extra_loss()
    run.step()


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("consistency", lambda z, base: F.kl_div(z.log_softmax(-1), base.log_softmax(-1),
                                                 reduction="batchmean", log_target=True)),
        ("diversity", lambda z, _: (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()),
        ("svd", lambda z, _: top_share(z, 3)),
    ],
)  # fmt: skip
def test_tokens_with_a_label_are_held_against_the_base(weight: str, value) -> None:
    model, batch = language_model()
    base = copy.deepcopy(model)
    adapter = plait.attach(model, "lora", rank=2, seed=0)
    batch["labels"][:, :3] = -100
    run = stack(model, **{weight: 0.7})
    moved(model, run, batch)
    z, z0 = (m(**batch).logits[:, 2:-1].flatten(0, 1).detach() for m in (model, base))
    term = run.extra_loss()
    torch.testing.assert_close(term.detach(), 0.7 * value(z, z0))
    term.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
    assert any(p.grad.abs().max() > 0 for p in adapter.parameters())


def test_classes_get_the_losses_of_classes() -> None:
    model = make_model("linear", F64).requires_grad_(False).train()
    base = copy.deepcopy(model)
    plait.attach(model, "lora", rank=2, seed=0)
    batch = {"x": logits(8, *SUBJECTS["linear"].shape), "labels": torch.arange(8)}
    run = stack(model, consistency=0.5, diversity=0.3, svd=0.2)
    moved(model, run, batch)
    z, z0 = (m(**batch).logits.detach() for m in (model, base))
    want = 0.5 * F.mse_loss(F.normalize(z), F.normalize(z0)) + 0.2 * top_share(z, 3)
    matrix = torch.cov(z.T)
    want += 0.3 * (matrix - matrix.diag().diag()).square().sum() / z.shape[1]
    torch.testing.assert_close(run.extra_loss().detach(), want)


@pytest.mark.parametrize("weight", ["consistency", "diversity", "svd"])
def test_tokens_without_a_label_change_nothing(weight: str) -> None:
    model, batch = language_model()
    plait.attach(model, "lora", rank=2, seed=0)
    run = stack(model, **{weight: 1.0})
    moved(model, run, batch)
    model(**batch)
    first = run.extra_loss()
    padding = torch.full((3, 4), 5)
    ids = torch.cat([batch["input_ids"], padding], 1)
    labels = torch.cat([batch["labels"], torch.full_like(padding, -100)], 1)
    model(input_ids=ids, labels=labels)
    torch.testing.assert_close(run.extra_loss(), first)
    model(input_ids=ids, labels=torch.full_like(labels, -100))
    assert run.extra_loss() == 0.0


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_at_the_start_nothing_is_far_from_the_base(method: str) -> None:
    model, batch = language_model()
    with torch.no_grad():
        before = model(**batch).logits
    plait.attach(model, method, rank=2, seed=0)
    run = stack(model, consistency=1.0)
    torch.testing.assert_close(model(**batch).logits.detach(), before, atol=1e-4, rtol=0)
    assert abs(run.extra_loss().item()) < 1e-8


def test_the_base_s_pass_leaves_adapters_and_other_rules_as_they_were() -> None:
    model, batch = language_model()
    adapter = plait.attach(model, "lora", rank=2, seed=0)
    run = stack(model, consistency=1.0)
    moved(model, run, batch)
    answer = model(**batch).logits.detach()
    run.extra_loss()
    assert run.extra_loss() == 0.0, "each forward is looked at once"
    assert torch.equal(model(**batch).logits.detach(), answer)
    assert list(plait.adapters(model)) == [adapter.name]
    model.eval()(**batch)
    run.extra_loss()
    model(**batch)
    assert run.extra_loss() == 0.0, "an evaluation is no training pass"
    run.finish()
    assert not model._forward_hooks


def test_without_consistency_there_is_no_second_pass() -> None:
    model, batch = language_model()
    plait.attach(model, "lora", rank=2, seed=0)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for run, passes in ((stack(model, svd=1.0), 1), (stack(model, consistency=1.0), 2)):
        calls.clear()
        model(**batch)
        run.extra_loss()
        run.finish()
        assert len(calls) == passes


def test_weights_trained_in_place_have_no_base_beside_them() -> None:
    model, _ = language_model()
    plait.attach(model, "paca", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="use consistency 0"):
        stack(model, consistency=1.0)
    stack(model, svd=1.0)


def test_wrong_options_are_named() -> None:
    for wrong in ({"form": "lm"}, {"consistency": -1}, {"k": 0}):
        with pytest.raises(plait.PlaitError, match=f"ba-lora: {next(iter(wrong))}"):
            BaLora(**wrong)
