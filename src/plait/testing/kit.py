"""`check_method`: every property of the kit, for one method."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from plait.adapter import Method, get_method
from plait.adapter.registry import names
from plait.errors import PlaitError, unknown
from plait.testing import function, life, training
from plait.testing.case import Case, NotApplicable, known
from plait.testing.models import SUBJECTS, get_subject

Check = Callable[[Case], None]

_IN_EVERY_DTYPE: tuple[Check, ...] = (
    function.zero_start,
    function.forward_equals_dense,
    function.adapt_equals_forward,
    function.weighted,
    function.fused_equals_unfused,
    life.state_round_trip,
    life.file_round_trip,
    life.detach_restores_the_base,
)
_IN_FLOAT32: tuple[Check, ...] = (
    function.to_lora_is_what_it_says,
    function.two_adapters,
    function.per_row_equals_one_by_one,
    life.count_is_declared,
    life.kinds_are_declared,
    life.copies_work,
    life.state_dict_is_the_base,
    life.seeds_reproduce,
    training.gradients_are_derivatives,
    training.every_parameter_trains,
    training.checkpointing_keeps_gradients,
    training.loss_falls,
)
CHECKS: dict[str, Check] = {c.__name__: c for c in (*_IN_EVERY_DTYPE, *_IN_FLOAT32)}
"""{property: the function that checks it on a `Case`, raising AssertionError}."""


def attachable() -> list[str]:
    """The registered methods that can be attached, by name."""
    found = (get_method(name) for name in names())
    return [m.name for m in found if m.delta is not None or m.choose is not None]


def kinds_of(method: Method) -> list[str]:
    """The subjects that a method is tried on: those of the site kinds that its delta declares."""
    if method.choose is not None:
        return ["module"]  # it picks its own sites in a transformer
    return [name for name, subject in SUBJECTS.items() if subject.kind in method.kinds]


def cases(
    method: str | Method,
    *,
    kinds: Collection[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    checks: Collection[str] | None = None,
) -> Iterator[tuple[str, Case]]:
    """(property, case) pairs that concern a method; the first dtype serves what needs only one."""
    method = get_method(method)
    for kind in kinds_of(method) if kinds is None else kinds:
        get_subject(kind)
        for name, check in CHECKS.items():
            if checks is not None and name not in checks:
                continue
            for dtype in dtypes if check in _IN_EVERY_DTYPE else dtypes[:1]:
                yield name, Case(method, kind, dtype)


def check_method(
    method: str | Method,
    *,
    kinds: Collection[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    checks: Collection[str] | None = None,
) -> int:
    """Try every property of the kit on a method; what a third party's own test calls.

        def test_my_method():
            plait.testing.check_method(METHOD)

    Args:
        method: a name or a record; it need not be registered.
        kinds: of `plait.testing.SUBJECTS`; None takes what the method's delta declares.
        dtypes: of the base model.
        checks: names in `plait.testing.CHECKS`; None takes all.

    Returns the number of properties that held. Raises AssertionError naming every property that
    does not, and PlaitError for unknown names or a method that cannot be attached.
    """
    method = get_method(method)
    if method.delta is None and method.choose is None:
        raise PlaitError(f"method {method.name!r} has no delta, so there is nothing to attach.")
    for name in checks or ():
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    held, failed = 0, []
    with known(method):
        for name, case in cases(method, kinds=kinds, dtypes=dtypes, checks=checks):
            try:
                CHECKS[name](case)
                held += 1
            except NotApplicable:
                continue
            except Exception as e:  # a crash is a failure like another: report it with the rest
                failed.append(f"{name} ({case}): {type(e).__name__}: {e}")
    if failed:
        raise AssertionError(f"{method.name}: {len(failed)} failed\n  " + "\n  ".join(failed))
    return held
