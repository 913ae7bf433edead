"""The kit itself: a sound method passes, and each way of being wrong is caught by its own check."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import plait
from plait.adapter import Method, Options, PairDelta, PairOptions, Traits, per_site
from plait.adapter.delta import Delta
from plait.linalg import LowRank
from plait.testing import CHECKS, Case, NotApplicable, attachable, cases, check_method, kinds_of


class Plain(Delta):
    """A dense change of its own: what a third party might write in ten lines."""

    def build(self) -> None:
        self.parameter("change", *self.site.shape)

    def dense(self) -> Tensor:
        return self.get_parameter("change")


def method(delta: type[Delta], options: type[Options] = Options, **more: Any) -> Method:
    size = lambda site, o: site.out_features * site.in_features  # noqa: E731
    count = more.pop("count", per_site(size))
    return Method(
        "home-made", "Home made", "none", "parameterisation", options, delta, count, **more
    )


def pair_method(delta: type[PairDelta]) -> Method:
    count = per_site(lambda site, o: o.rank * (site.out_features + site.in_features))
    return method(delta, PairOptions, count=count)


def run(check: str, tried: Method) -> None:
    CHECKS[check](Case(tried, "linear"))


def test_a_home_made_method_passes_unregistered_and_leaves_no_trace() -> None:
    assert check_method(method(Plain), kinds=["linear"]) > 20
    assert "home-made" not in plait.method_names()


class NonzeroStart(Plain):
    def reset(self) -> None:
        self.start("change", "normal")


class FalselyNonzeroStart(Plain):
    traits = Traits(zero_start=False)


class ForwardForgetsHalf(Plain):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, y)


class AdaptForgetsTheBase(Plain):
    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(args[0])


class WrongFactors(PairDelta):
    def dense(self) -> Tensor:
        return 1.1 * super().dense()


class NotSaved(Plain):
    """Keeps a number that no file holds and no seed regenerates."""

    def attached(self) -> None:
        self.secret = torch.rand(1)

    def dense(self) -> Tensor:
        return self.get_parameter("change") + self.secret


class GlobalGenerator(PairDelta):
    def reset(self) -> None:
        with torch.no_grad():
            self.A.copy_(torch.randn(self.A.shape))


class SeedIgnored(PairDelta):
    def reset(self) -> None:
        self.generator("A")
        with torch.no_grad():
            self.A.fill_(0.1)


class TouchesTheBase(Plain):
    def attached(self) -> None:
        with torch.no_grad():
            self.site.weight().mul_(1.5)


class WrongGradient(Plain):
    def dense(self) -> Tensor:
        change = self.get_parameter("change")
        return 2 * change - change.detach()


class StopsGradientOfX(Plain):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x.detach(), y)


class DeadParameter(Plain):
    def build(self) -> None:
        super().build()
        self.parameter("unused", 3)


class NeverLearns(Plain):
    def dense(self) -> Tensor:
        return 0 * self.get_parameter("change")


class Interferes(Plain):
    """All deltas of the class read one tensor, whatever adapter they belong to."""

    common: dict[str, Tensor] = {}  # noqa: RUF012 - the mistake under test

    def dense(self) -> Tensor:
        return Interferes.common.setdefault(self.site.path, self.get_parameter("change"))


class ReadsTheWholeBatch(Plain):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True), y)


class RoundsTwice(PairDelta):
    """Reports exact factors that are not its dW (only the export sees it)."""

    traits = Traits()

    def factors(self) -> LowRank:
        low = super().factors()
        return LowRank(B=low.B.bfloat16().to(low.B.dtype), A=low.A, scale=low.scale)

    def dense(self) -> Tensor:
        return self.trained().dense()


class LeavesAHook(Plain):
    def attached(self) -> None:
        self.site.base.leftover = 1  # type: ignore[assignment]


class HoldsALambda(Plain):
    def build(self) -> None:
        super().build()
        self.scale = lambda t: t

    def dense(self) -> Tensor:
        return self.scale(self.get_parameter("change"))


MISTAKES = [
    ("zero_start", method(NonzeroStart)),
    ("zero_start", method(FalselyNonzeroStart)),
    ("forward_equals_dense", method(ForwardForgetsHalf)),
    ("forward_equals_dense", pair_method(WrongFactors)),
    ("adapt_equals_forward", method(AdaptForgetsTheBase)),
    ("weighted", method(ForwardForgetsHalf)),
    ("fused_equals_unfused", method(ForwardForgetsHalf)),
    ("state_round_trip", method(NotSaved)),
    ("detach_restores_the_base", method(TouchesTheBase)),
    ("detach_restores_the_base", method(LeavesAHook)),
    ("state_dict_is_the_base", method(TouchesTheBase)),
    ("seeds_reproduce", pair_method(GlobalGenerator)),
    ("seeds_reproduce", pair_method(SeedIgnored)),
    ("gradients_are_derivatives", method(WrongGradient)),
    ("gradients_are_derivatives", method(StopsGradientOfX)),
    ("every_parameter_trains", method(DeadParameter)),
    ("count_is_declared", method(DeadParameter)),
    ("loss_falls", method(NeverLearns)),
    ("two_adapters", method(Interferes)),
    ("per_row_equals_one_by_one", method(ReadsTheWholeBatch)),
    ("to_lora_is_what_it_says", pair_method(RoundsTwice)),
    ("copies_work", method(HoldsALambda)),
]


@pytest.mark.parametrize(
    ("check", "wrong"), MISTAKES, ids=[f"{c}-{m.delta.__name__}" for c, m in MISTAKES]
)
def test_each_mistake_is_caught_by_its_own_check(check: str, wrong: Method) -> None:
    Interferes.common.clear()
    run(check, method(Plain) if wrong.options is Options else pair_method(PairDelta))
    # What cannot be copied raises pickle's own error; the other mistakes are the kit's to name.
    error = AssertionError if check != "copies_work" else (AttributeError, pickle.PicklingError)
    with pytest.raises(error):
        CHECKS[check](Case(wrong, "linear"))


def test_check_method_reports_every_failure_with_its_property() -> None:
    with pytest.raises(AssertionError, match=r"zero_start .home-made on linear, float32") as caught:
        check_method(method(NonzeroStart), kinds=["linear"], checks=["zero_start", "weighted"])
    assert "2 failed" in str(caught.value)  # both dtypes; `weighted` holds


def test_opting_out_of_exact_gradients_is_a_declaration() -> None:
    class Declared(WrongGradient):
        gradient_is_exact = False

    with pytest.raises(NotApplicable):
        run("gradients_are_derivatives", method(Declared))


def test_unknown_names_are_errors_that_name_the_nearest() -> None:
    with pytest.raises(plait.PlaitError, match="zero_start"):
        check_method("lora", checks=["zero_starts"])
    with pytest.raises(plait.PlaitError, match="linear"):
        check_method("lora", kinds=["linar"])
    with pytest.raises(plait.PlaitError, match="no delta"):
        check_method(dataclasses.replace(method(Plain), delta=None))


def test_every_attachable_method_is_tried_somewhere() -> None:
    for name in attachable():
        assert kinds_of(plait.get_method(name)), f"{name} declares no kind that the kit knows"
        assert len(list(cases(name))) > 20
