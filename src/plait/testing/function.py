"""Checks of what the adapted model computes: start, dense form, weights, fusing, other formats.

The oracle is independent of Plait's plans and kernels: a fresh copy of the base model into whose
parameters dW is written by hand, run in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, activate, bind, detach, fuse, install, per_row, unfuse
from plait.testing.case import (
    Case,
    NotApplicable,
    close,
    must_refuse,
    perturb,
    same,
    traits_all,
    traits_any,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def zero_start(case: Case) -> None:
    """The model just after attaching equals the base, unless the trait `zero_start` denies it.

    Equal in bits where dW is stored as zeros; up to rounding where the start cancels (what an
    initialiser holds back) or W is recomposed.
    """
    model = case.model()
    x = case.x()
    base = case.output(model, x)
    adapter = case.attach(model)
    got = case.output(model, x)
    if not traits_all(adapter, "zero_start"):
        # bfloat16 may swallow a start that is only nearly zero.
        assert case.dtype == torch.bfloat16 or not torch.equal(got, base), (
            "zero_start is declared False, yet the adapted model starts equal to the base; "
            "declare it True"
        )
    elif _stores_zero(adapter):
        same(got, base, "output at the start")
    else:
        close(got, base, TOLERANCE[case.dtype], "output at the start")


def _stores_zero(adapter: Adapter) -> bool:
    if not traits_all(adapter, "linear_in_x") or traits_any(adapter, "depends_on_base"):
        return False
    if traits_any(adapter, "reads_output"):
        return False
    return all(not bool(d.dense().any()) for d in adapter.deltas.values())


def forward_equals_dense(case: Case) -> None:
    """The adapted model equals a base model with W + dW (and bias + change) written into it."""
    model, adapter = case.adapted()
    _needs_linear(adapter)
    oracle = with_dense(case, {"a": adapter}, {"a": 1.0})
    for x in case.inputs():
        wanted = case.output(oracle, _double(x))
        close(case.output(model, x), wanted, TOLERANCE[case.dtype], f"output for x {list(x.shape)}")
    base = case.output(case.model(torch.float64), _double(case.x()))
    moved = (case.output(oracle, _double(case.x())) - base).detach().abs().max()
    assert float(moved) > 1e-4, "the perturbed adapter changes nothing: this check proves nothing"


def adapt_equals_forward(case: Case) -> None:
    """The fused path (`adapt`, the kernels) equals base output + weight x `forward`."""
    model, adapter = case.adapted()
    if traits_any(adapter, "edits_base"):
        raise NotApplicable("the change lives in the weights")
    for x in case.inputs():
        fast, trained = case.output(model, x), case.run(model, x)
        activate(model, {"a": torch.tensor(1.0, dtype=case.dtype)})
        wanted = case.output(model, x)
        close(fast, wanted, TOLERANCE[case.dtype], "adapt against base + forward")
        close(trained, wanted, TOLERANCE[case.dtype], "adapt in a pass that trains")
        activate(model, "a")


def weighted(case: Case) -> None:
    """Active at weight 0.5, the adapter counts half; at weight 0 it is the base in bits."""
    model, adapter = case.adapted()
    if traits_any(adapter, "edits_base"):
        must_refuse(lambda: activate(model, {"a": 0.5}), "a weight below 1 of what edits the base")
        return
    x = case.x()
    activate(model, {"a": 0.0})
    same(case.output(model, x), case.output(case.model(), x), "output at weight 0")
    _needs_linear(adapter)
    activate(model, {"a": 0.5})
    wanted = case.output(with_dense(case, {"a": adapter}, {"a": 0.5}), _double(x))
    close(case.output(model, x), wanted, TOLERANCE[case.dtype], "output at weight 0.5")


def fused_equals_unfused(case: Case) -> None:
    """`fuse` keeps the output, `unfuse` puts the very same parameters back; else fuse refuses."""
    model, adapter = case.adapted()
    if not traits_all(adapter, "linear_in_x") or traits_any(adapter, "edits_base"):
        must_refuse(lambda: fuse(model), "fusing what is not linear in x, or lives in the weights")
        return
    x = case.x()
    before, stored = case.output(model, x), {n: (p, p.clone()) for n, p in model.named_parameters()}
    fuse(model)
    # In bfloat16 W + dW is rounded once more than W and the change apart.
    close(case.output(model, x), before, 1.5 * TOLERANCE[case.dtype], "fused output")
    unfuse(model)
    for name, parameter in model.named_parameters():
        assert parameter is stored[name][0], f"unfuse left another object at {name!r}"
        same(parameter, stored[name][1], f"parameter {name!r} after unfuse")
    same(case.output(model, x), before, "output after unfuse")


def to_lora_is_what_it_says(case: Case) -> None:
    """`to_lora` is exact where `factors()` exist, and elsewhere off by the energy it reports."""
    _, adapter = case.adapted()
    packed = any(len(d.site.shape) > 2 for d in adapter.deltas.values())
    if packed or not traits_all(adapter, "linear_in_x"):
        must_refuse(adapter.to_lora, "a LoRA of packed tensors or of what is not linear in x")
        return
    low = adapter.to_lora()
    assert low.method.name == "lora" and list(low.deltas) == list(adapter.deltas)
    for path, delta in adapter.deltas.items():
        _check_export(path, delta.dense(), low.deltas[path].dense(), low, delta.factors() is None)
        bias, other = delta.bias(), low.deltas[path].bias()
        if bias is not None:
            assert other is not None, f"{path}: the change of the bias was lost"
            close(other, bias, 1e-6, f"{path}: bias")
    wanted = case.output(with_dense(case, {"a": low}, {"a": 1.0}), _double(case.x()))
    fresh = case.model()
    install(fresh, bind(low, fresh))
    close(case.output(fresh, case.x()), wanted, 2e-5, "the exported LoRA on a fresh base")


def _check_export(path: str, wanted: Tensor, got: Tensor, low: Adapter, approximate: bool) -> None:
    dropped = float(low.info["dropped_energy"][path])
    wanted, got = wanted.detach().double(), got.detach().double()
    energy = float(wanted.square().sum())
    lost = float((wanted - got).square().sum()) / max(energy, 1e-30)
    if not approximate:
        assert dropped == 0, f"{path}: exact factors, but dropped_energy is {dropped}"
        close(got, wanted, 1e-5, f"{path}: exported dW")
    assert abs(lost - dropped) <= 1e-5, f"{path}: lost {lost:.2e}, reported {dropped:.2e}"
    assert lost <= 1.1e-3, f"{path}: the default export lost {lost:.2e} of the energy"


def two_adapters(case: Case) -> None:
    """Two adapters of the method: a, b, both, none give what each should; training b leaves a."""
    model, a = case.adapted()
    x = case.x()
    only_a = case.output(model, x)
    b = case.attach(model, "b", seed=2, activate=False)
    perturb(b, 2)
    same(case.output(model, x), only_a, "output of a after b was attached inactive")
    activate(model, {})
    same(case.output(model, x), case.output(case.model(), x), "output with none active")
    activate(model, "b")
    alone_model, _ = case.adapted("b", seed=2)
    same(case.output(model, x), case.output(alone_model, x), "output of b beside a")
    if traits_any(a, "edits_base"):
        must_refuse(lambda: activate(model, ["a", "b"]), "two adapters that edit the base at once")
    else:
        activate(model, ["a", "b"])
        both = case.output(model, x)
        if traits_all(a, "linear_in_x"):
            oracle = with_dense(case, {"a": a, "b": b}, {"a": 1.0, "b": 1.0})
            wanted = case.output(oracle, _double(x))
            close(both, wanted, TOLERANCE[case.dtype], "both active")
    activate(model, "b")
    _one_step(case, model, b, a)
    activate(model, "a")
    same(case.output(model, x), only_a, "output of a after training b")
    detach(model, "b")
    same(case.output(model, x), only_a, "output of a after detaching b")


def _one_step(case: Case, model: nn.Module, trained: Adapter, other: Adapter) -> None:
    before = {k: t.clone() for k, t in other.state_dict().items()}
    moving = {k: t.clone() for k, t in trained.state_dict().items()}
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    case.run(model, case.x()).square().mean().backward()
    optimizer.step()
    for key, tensor in other.state_dict().items():
        same(tensor, before[key], f"{key} of a after training b")
    moved = any(not torch.equal(t, moving[k]) for k, t in trained.state_dict().items())
    assert moved, "a step on b moved none of its tensors"


def per_row_equals_one_by_one(case: Case) -> None:
    """A batch whose rows go through a, b, the base and a equals the rows one by one."""
    model, a = case.adapted()
    b = case.attach(model, "b", seed=2, activate=False)
    perturb(b, 2)
    rows: list[str | None] = ["a", "b", None, "a"]
    if traits_any(a, "edits_base") or case.kind == "parameter":
        must_refuse(lambda: per_row(model, rows).__enter__(), "single rows of changed weights")
        return
    x = case.x()
    with per_row(model, rows):
        together = case.output(model, x)
    for i, name in enumerate(rows):
        activate(model, [name] if name else [])
        close(together[i : i + 1], case.output(model, x[i : i + 1]), 2e-5, f"row {i} ({name})")


# -- the oracle -----------------------------------------------------------------------------------


def with_dense(case: Case, adapters: dict[str, Adapter], weights: dict[str, float]) -> nn.Module:
    """A fresh float64 base with the weighted sum of dW and of bias changes written into it."""
    model = case.model(torch.float64)
    with torch.no_grad():
        for name, adapter in adapters.items():
            for path, delta in adapter.deltas.items():
                change = weights[name] * delta.dense().detach().double()
                bias = delta.bias()
                shift = None if bias is None else weights[name] * bias.detach().double()
                _write(model, path, delta.site.kind, change, shift)
    return model


def _write(model: nn.Module, path: str, kind: str, change: Tensor, shift: Tensor | None) -> None:
    if kind == "parameter":
        model.get_parameter(path).add_(change)
        return
    module = model.get_submodule(path)
    weight = module.get_parameter("weight")
    if kind == "conv":
        change = change.reshape(weight.shape)
    elif kind == "embedding" or type(module).__name__ == "Conv1D":
        change = change.t()
    weight.add_(change)
    if shift is None:
        return
    if module._parameters.get("bias") is None:
        module.register_parameter("bias", nn.Parameter(torch.zeros_like(shift)))
    module.get_parameter("bias").add_(shift)


def _needs_linear(adapter: Adapter) -> None:
    if not traits_all(adapter, "linear_in_x"):
        raise NotApplicable("the change is not linear in x, so there is no dW")


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
