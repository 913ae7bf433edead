"""Checks of an adapter's life on a model: files, detaching, copies, seeds, counts, state dicts."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, detach, find_sites, make_options, seeds
from plait.testing.case import (
    Case,
    NotApplicable,
    close,
    known,
    perturb,
    rebuilt,
    same,
    same_tensors,
    traits_any,
)


def count_is_declared(case: Case) -> None:
    """Trainable parameters equal `METHOD.count(sites, options)`."""
    adapter = case.attach(case.model())
    assert case.method.count is not None, "the method publishes no count formula"
    options = make_options(case.method, case.options)
    deltas = adapter.deltas.values()
    if all(d.options == options for d in deltas):
        declared = case.method.count([d.site for d in deltas], options)
    else:  # an initialiser dealt out the ranks anew: each site has its own
        declared = sum(case.method.count([d.site], d.options) for d in deltas)
    has = adapter.num_parameters()
    assert declared == has, f"the formula counts {declared} trainable parameters, there are {has}"


def state_round_trip(case: Case) -> None:
    """Its tensors, options and seed make the same adapter on a fresh base, bit for bit."""
    model, adapter = case.adapted()
    fresh = case.model()
    again = rebuilt(adapter, fresh)
    _same_adapter(adapter, again)
    for x in case.inputs():
        wanted = case.output(model, x)
        same(case.output(fresh, x), wanted, "output after rebuilding")


def file_round_trip(case: Case) -> None:
    """`adapter.save` and `plait.load` give the same tensors, bit for bit, and so the same model.

    Outputs are compared up to rounding: tensors read from a file are not aligned in memory as
    allocated ones are, and the last bit of a matrix product may depend on that.
    """
    formats: Any = importlib.import_module("plait.adapter.formats")
    if not (hasattr(formats, "save_adapter") and hasattr(formats, "load")):
        raise NotApplicable("this build has no file formats")
    model, adapter = case.adapted()
    with known(case.method), tempfile.TemporaryDirectory() as folder:
        path = adapter.save(Path(folder) / "adapter")
        fresh = case.model()
        again = formats.load(fresh, path)
        _same_adapter(adapter, again)
        tolerance = 1e-2 if case.dtype == torch.bfloat16 else 1e-6
        for x in case.inputs():
            close(case.output(fresh, x), case.output(model, x), tolerance, "output after loading")


def _same_adapter(adapter: Adapter, again: Adapter) -> None:
    same_tensors(again.state_dict(), adapter.state_dict(), "tensors read back")
    same_tensors(again.seeded_tensors(), adapter.seeded_tensors(), "regenerated tensors")


def detach_restores_the_base(case: Case) -> None:
    """Detaching gives back tensors, outputs, classes and requires_grad flags, bit for bit."""
    model = case.model()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)  # a flag that must not be turned on by detaching
    before, x = _portrait(model), case.x()
    tensors = {k: t.clone() for k, t in model.state_dict().items()}
    output = case.output(model, x)
    perturb(case.attach(model))
    case.output(model, x)
    detach(model)
    assert _portrait(model) == before, "modules, classes or requires_grad flags were not restored"
    same_tensors(dict(model.state_dict()), tensors, "state dict after detaching")
    same(case.output(model, x), output, "output after detaching")


def _portrait(model: nn.Module) -> dict[str, Any]:
    modules: dict[str, Any] = {n: (type(m), sorted(m.__dict__)) for n, m in model.named_modules()}
    return modules | {f"{n}: flag": p.requires_grad for n, p in model.named_parameters()}


def copies_work(case: Case) -> None:
    """deepcopy, pickle and torch.save of the adapted model compute the same, independently."""
    model, _ = case.adapted()
    x = case.x()
    wanted = case.output(model, x)
    with known(case.method):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = {
            "deepcopy": copy.deepcopy(model),
            "pickle": pickle.loads(pickle.dumps(model)),
            "torch.save": torch.load(buffer, weights_only=False),
        }
    for how, other in copies.items():
        same(case.output(other, x), wanted, f"output of a copy by {how}")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        same(case.output(model, x), wanted, f"output after changing a copy made by {how}")


def state_dict_is_the_base(case: Case) -> None:
    """While attached, the model's state dict has the base's keys, and base checkpoints load."""
    model = case.model()
    checkpoint = {k: t.clone() for k, t in model.state_dict().items()}
    adapter = case.attach(model)
    perturb(adapter)
    assert list(model.state_dict()) == list(checkpoint), "the model's state-dict keys changed"
    if traits_any(adapter, "edits_base"):
        return  # what a checkpoint holds of a base that is being rewritten is the method's affair
    same_tensors(dict(model.state_dict()), checkpoint, "state dict while attached")
    output = case.output(model, case.x())
    model.load_state_dict(checkpoint, strict=True)
    same(case.output(model, case.x()), output, "output after loading the base's checkpoint")


def seeds_reproduce(case: Case) -> None:
    """One seed, one start, whatever torch's own generator does; another seed, another start."""
    with _counted_draws() as draws:
        first = _start(case, seed=1, noise=0)
    drawn = len(draws)
    state = torch.get_rng_state()
    model = case.model()
    case.attach(model, seed=1)
    assert torch.equal(state, torch.get_rng_state()), (
        "attaching with a seed moved torch's global generator; draw from self.generator(...)"
    )
    same_tensors(_start(case, seed=1, noise=99), first, "start from the same seed")
    # An initialiser's randomised decomposition may come out the same whatever it drew.
    if drawn and case.method.initializer is None:
        other = _start(case, seed=2, noise=0)
        differs = any(not torch.equal(other[k], t) for k, t in first.items())
        assert differs, "another seed gave the same start, though the method draws from the seed"


def _start(case: Case, seed: int, noise: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise)
        adapter = case.attach(case.model(), seed=seed)
    tensors = {**adapter.state_dict(), **adapter.seeded_tensors()}
    return {k: t.clone() for k, t in tensors.items()}


@contextlib.contextmanager
def _counted_draws() -> Iterator[list[tuple[str, ...]]]:
    """Record which seeded streams are opened."""
    draws: list[tuple[str, ...]] = []
    real = seeds.generator

    def generator(seed: int, *names: str) -> torch.Generator:
        draws.append(names)
        return real(seed, *names)

    with mock.patch.object(seeds, "generator", generator):
        yield draws


def kinds_are_declared(case: Case) -> None:
    """The sites that the method takes are of kinds that its delta declares."""
    if case.method.choose is not None:
        raise NotApplicable("the method chooses its sites itself")
    model = case.model()
    adapter = case.attach(model)
    assert {d.site.kind for d in adapter.deltas.values()} <= case.method.kinds
    found = find_sites(model, case._targets() or case.method.targets, kinds=case.method.kinds)
    assert {s.path for s in found} >= set(adapter.deltas), "attached elsewhere than targeted"
