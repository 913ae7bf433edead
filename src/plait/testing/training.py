"""Checks of how an adapter trains: gradients, gradient checkpointing, and a small real task."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.adapter import RuleStack
from plait.testing.case import Case, NotApplicable, close

STEP = 1e-5
LEARNING_RATES = (3e-2, 3e-3, 3e-1)


def gradients_are_derivatives(case: Case) -> None:
    """In float64, autograd agrees with finite differences for every parameter and for x."""
    case = Case(case.method, case.kind, torch.float64)
    model, adapter = case.adapted()
    if not all(d.gradient_is_exact for d in adapter.deltas.values()):
        raise NotApplicable("the method declares that its gradient is not the derivative")
    model.eval()
    x = case.x()
    named = dict(adapter.named_parameters())
    if x.is_floating_point():
        named["x"] = x.requires_grad_(True)  # type: ignore[assignment]
    g = torch.Generator().manual_seed(5)
    target = torch.randn(case.run(model, x).shape, generator=g).double()

    def loss() -> Tensor:
        return (case.run(model, x) * target).sum()

    gradients = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
        _check_direction(name, tensor, gradient, loss, g)


def _check_direction(
    name: str,
    tensor: Tensor,
    gradient: Tensor | None,
    loss: Callable[[], Tensor],
    g: torch.Generator,
) -> None:
    """The derivative along a random direction: one number that sees every entry."""
    direction = torch.randn(tensor.shape, generator=g).to(tensor)
    value = tensor.detach().clone()
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            tensor.copy_(value + sign * STEP * direction)
            sides.append(float(loss()))
        tensor.copy_(value)
    measured = (sides[0] - sides[1]) / (2 * STEP)
    claimed = 0.0 if gradient is None else float((gradient * direction).sum())
    scale = max(abs(measured), abs(claimed), 1e-3)
    assert abs(measured - claimed) <= 1e-4 * scale, (
        f"gradient of {name}: autograd says {claimed:.6e}, finite differences {measured:.6e}"
    )


def every_parameter_trains(case: Case) -> None:
    """Away from the start every trainable tensor gets a gradient; the base and seeded ones none."""
    model, adapter = case.adapted()
    case.run(model, case.x()).square().sum().backward()
    mine = {id(p) for p in adapter.parameters()}
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name}: the gradient is not finite"
    for name, parameter in model.named_parameters():
        assert id(parameter) in mine or parameter.grad is None, f"{name} of the base got a gradient"


def checkpointing_keeps_gradients(case: Case) -> None:
    """Gradient checkpointing gives the same gradients."""
    model, adapter = case.adapted()
    x = case.x()
    parameters = list(adapter.parameters())
    plain = torch.autograd.grad(case.run(model, x).square().sum(), parameters, allow_unused=True)
    out = checkpoint(lambda v: case.run(model, v), x, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    for (name, _), a, b in zip(adapter.named_parameters(), plain, again, strict=True):
        assert (a is None) == (b is None), f"{name}: a gradient came or went"
        if a is not None and b is not None and float(a.abs().max()) > 0:
            close(b, a, 1e-6, f"gradient of {name} with checkpointing")


def loss_falls(case: Case) -> None:
    """Thirty Adam steps on a small task lower the loss by a tenth, at one of three rates."""
    falls = []
    for lr in LEARNING_RATES:
        first, last = _train(case, lr)
        falls.append(f"lr {lr}: {first:.3f} to {last:.3f}")
        if last < 0.9 * first:
            return
    raise AssertionError("the loss does not fall: " + "; ".join(falls))


def _train(case: Case, lr: float, steps: int = 30) -> tuple[float, float]:
    model = case.model()
    adapter = case.attach(model)
    model.train()
    x, labels = case.task()
    rules = [case.method.name] if case.method.axis == "rule" else []
    run = RuleStack(model, rules, lr=lr, total_steps=steps)
    first = float(_loss(case, model, x, labels).detach())
    for _ in range(steps):
        loss = _loss(case, model, x, labels) + run.extra_loss()
        loss.backward()
        run.step()
    run.finish()
    adapter.check()
    return first, float(_loss(case, model, x, labels).detach())


def _loss(case: Case, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    logits = case.run(model, x)
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
