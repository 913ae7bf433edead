"""`plait.merge` against dense float64 arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.adapter import Adapter, Delta, Method, Options, Traits
from plait.adapter import build_adapter as build
from plait.adapter.adapter import DeltaMap
from plait.adapter.site import LinearSite
from plait.errors import PlaitError, UnknownNameError
from plait.merging import Merge, MergeMethod, merge, merge_method_names


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16, bias=False))


def make_adapter(seed: int, name: str = "a", **options: object) -> Adapter:
    """A trained-looking LoRA: both factors random."""
    model = make_model()
    chosen: dict[str, object] = {"rank": 4, "alpha": 6.0, "targets": "all-linear", **options}
    adapter = plait.attach(model, "lora", name=name, seed=seed, **chosen)  # type: ignore[arg-type]
    randomise(adapter, seed)
    plait.detach(model)
    return adapter


def randomise(adapter: Adapter, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))


def oracle(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    """sum_i w_i * scaling_i * B_i A_i in float64, from the raw parameters."""
    total: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in adapter.deltas.items():
            o = delta.options
            root = o.rank**0.5 if o.rslora else o.rank
            change = delta.B.data.double() @ delta.A.data.double() * (weight * o.alpha / root)
            total[path] = total.get(path, torch.zeros_like(change)) + change
    return total


def check_equal(merged: Adapter, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert set(merged.deltas) == set(expected)
    for path, change in expected.items():
        error = (merged.deltas[path].dense().double() - change).norm() / change.norm()
        assert error < tolerance, path


def test_weighted_sum_is_exact_for_any_weights_ranks_and_scalings() -> None:
    adapters = [
        make_adapter(1, rank=4),
        make_adapter(2, "b", rank=2, alpha=16.0, rslora=True),
        make_adapter(3, "c", rank=5, alpha=1.0),
    ]
    weights = [0.7, -1.5, 2.0]
    merged = plait.merge(adapters, weights=weights)
    check_equal(merged, oracle(adapters, weights))
    assert merged.method.name == "lora"
    assert [d.rank for d in merged.deltas.values()] == [11, 11]
    assert merged.info["merge"]["weights"] == weights
    assert merged.info["merge"]["dropped_energy"] == 0.0


def test_the_merged_adapter_works_on_a_model() -> None:
    a, b = make_adapter(1), make_adapter(2, "b")
    merged = merge([a, b], weights=[1.0, 0.5])
    model, x = make_model(), torch.randn(3, 24)
    expected = make_model()
    with torch.no_grad():
        for path, change in oracle([a, b], [1.0, 0.5]).items():
            expected.get_submodule(path).weight += change.float()
    plait.adapter.install(model, plait.adapter.bind(merged, model))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.25, 0.75], [2.0, -1.0], None])
def test_copies_of_one_adapter_return_it(weights: list[float] | None) -> None:
    a = make_adapter(1)
    check_equal(merge([a, a], weights=weights), oracle([a], [1.0]))


def test_turning_the_factors_does_not_matter() -> None:
    a, b, turned = make_adapter(1), make_adapter(2), make_adapter(2)
    for delta in turned.deltas.values():
        Q = torch.linalg.qr(torch.randn(4, 4)).Q * 3.0
        delta.B.data, delta.A.data = delta.B.data @ Q, torch.linalg.inv(Q) @ delta.A.data
    for rank in (None, 3):
        one, other = merge([a, b], rank=rank), merge([a, turned], rank=rank)
        for path, delta in one.deltas.items():
            torch.testing.assert_close(
                other.deltas[path].dense(), delta.dense(), rtol=1e-3, atol=1e-4
            )


def test_a_cut_is_the_best_approximation_and_reports_what_it_drops() -> None:
    adapters = [make_adapter(1), make_adapter(2)]
    merged = merge(adapters, weights=[1.0, 0.3], rank=3)
    lost = total = 0.0
    for path, change in oracle(adapters, [1.0, 0.3]).items():
        S = torch.linalg.svdvals(change)
        tail, square = float(S[3:].square().sum()), float(S.square().sum())
        error = float((merged.deltas[path].dense().detach() - change).square().sum())
        assert error == pytest.approx(tail, rel=1e-4)
        assert merged.deltas[path].rank == 3
        assert merged.info["dropped_energy"][path] == pytest.approx(tail / square, rel=1e-4)
        lost, total = lost + tail, total + square
    assert merged.info["merge"]["dropped_energy"] == pytest.approx(lost / total, rel=1e-4)


def test_energy_keeps_the_fewest_components_that_hold_it() -> None:
    adapters = [make_adapter(1), make_adapter(2)]
    merged = merge(adapters, weights=[1.0, 0.1], energy=0.9)
    for path, change in oracle(adapters, [1.0, 0.1]).items():
        held = torch.linalg.svdvals(change).square().cumsum(0)
        wanted = int((held < 0.9 * held[-1]).sum()) + 1
        assert merged.deltas[path].rank == wanted


def test_the_rank_of_an_exact_merge_stops_at_the_shorter_side() -> None:
    adapters = [make_adapter(seed, f"a{seed}") for seed in range(8)]
    weights = [1.0] * 8
    merged = merge(adapters, weights=weights)
    assert {p: d.rank for p, d in merged.deltas.items()} == {"0": 24, "2": 16}
    check_equal(merged, oracle(adapters, weights), 5e-6)


def test_a_site_that_an_adapter_lacks_counts_as_zero() -> None:
    a, b = make_adapter(1, targets=["0"]), make_adapter(2, targets=["2"])
    merged = merge([a, b], weights=[0.5, 2.0])
    check_equal(merged, oracle([a, b], [0.5, 2.0]))
    assert [d.rank for d in merged.deltas.values()] == [4, 4]


def test_bias_changes_are_summed() -> None:
    a, b = make_adapter(1, targets=["0"], bias=True), make_adapter(2, targets=["0"])
    c = make_adapter(3, targets=["0"], bias=True)
    merged = merge([a, b, c], weights=[2.0, 1.0, -1.0])
    expected = 2.0 * a.deltas["0"].c.data - c.deltas["0"].c.data
    torch.testing.assert_close(merged.deltas["0"].bias().data, expected)


def test_half_precision_adapters_stay_so_and_are_cut_in_float32() -> None:
    a = make_adapter(1, dtype=torch.bfloat16)
    merged = merge([a, a], rank=4)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    check_equal(merged, oracle([a], [1.0]), 1e-2)


class Scaled(Delta):
    """A change without factors: one number a row times a fixed pattern."""

    traits = Traits()

    def build(self) -> None:
        self.parameter("g", *self.site.shape)

    def dense(self) -> Tensor:
        return self.g


class OnBase(Delta):
    traits = Traits(depends_on_base=True)

    def build(self) -> None:
        self.parameter("m", self.site.out_features, 1)

    def dense(self) -> Tensor:
        return self.m * self.base_weight()


@dataclass(frozen=True)
class NoChoice(Options):
    pass


def unregistered(delta: type[Delta]) -> Method:
    return Method("own", "Own", "none", "parameterisation", options=NoChoice, delta=delta)


def test_a_method_without_factors_merges_exactly_with_one_that_has_them() -> None:
    a = make_adapter(1, targets=["0"])
    site = LinearSite("0", (40, 24))
    full = build("full", unregistered(Scaled), [(site, Scaled)], NoChoice())
    randomise(full, 3)
    merged = merge([a, full], weights=[1.0, 0.5])
    expected = oracle([a], [1.0])["0"] + 0.5 * full.deltas["0"].g.data.double()
    check_equal(merged, {"0": expected})


def test_a_method_that_needs_the_base_says_so_until_it_is_attached() -> None:
    a = make_adapter(1, targets=["0"])
    bare = build("own", unregistered(OnBase), [(LinearSite("0", (40, 24)), OnBase)], NoChoice())
    with pytest.raises(PlaitError, match=r"'own'.*needs the base weights.*attach it first"):
        merge([a, bare])
    model = make_model()
    randomise(bare, 5)
    plait.adapter.install(model, plait.adapter.bind(bare, model))
    expected = bare.deltas["0"].m.data.double() * model.get_submodule("0").weight.data.double()
    check_equal(merge([bare], weights=[2.0]), {"0": 2.0 * expected})


def test_unknown_names_are_named_with_the_nearest() -> None:
    a = make_adapter(1)
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        merge([a], method="linaer")
    with pytest.raises(UnknownNameError, match="unknown option 'density'"):
        merge([a], density=0.5)
    assert "linear" in merge_method_names()


def test_a_method_of_ones_own_gets_its_options() -> None:
    @dataclass
    class Own(Merge):
        power: float = 1.0

        def merge(self, lows, weights, changes):  # type: ignore[no-untyped-def]
            return lows[0] * (weights[0] * self.power)

    a = make_adapter(1)
    own = MergeMethod("own", "Own", "none", Own)
    check_equal(merge([a], method=own, weights=[2.0], power=3.0), oracle([a], [6.0]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "not a finite number"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"energy": 1.5}, "share in"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(PlaitError, match=message):
        merge([make_adapter(1), make_adapter(2)], **arguments)


def test_damaged_and_foreign_adapters_are_refused() -> None:
    a, b = make_adapter(1), make_adapter(2, "b")
    b.deltas["2"].A.data[0, 0] = float("nan")
    with pytest.raises(PlaitError, match=r"'b'.*NaN"):
        merge([a, b])
    c = make_adapter(3, "c")
    a.info["base_fingerprint"], c.info["base_fingerprint"] = "1" * 32, "2" * 32
    with pytest.raises(PlaitError, match="different base models"):
        merge([a, c])
    other = build("d", "lora", [(LinearSite("0", (8, 8)), type(a.deltas["0"]))], a.options)
    with pytest.raises(PlaitError, match=r"'0'.*\[40, 24\].*\[8, 8\]"):
        merge([make_adapter(1), other])
    empty = Adapter("e", a.method, a.options, DeltaMap(), a.shared, 0)
    with pytest.raises(PlaitError, match="no sites"):
        merge([empty])
    with pytest.raises(PlaitError, match="nothing to merge"):
        merge([])
    with pytest.raises(PlaitError, match="list of adapters"):
        merge(a)  # type: ignore[arg-type]


def test_the_base_that_the_inputs_name_is_kept() -> None:
    a, b = make_adapter(1), make_adapter(2)
    b.info.update(base="smollm2-135m", base_fingerprint="f" * 32, trained_steps=10)
    info = merge([a, b]).info
    assert info["base"] == "smollm2-135m" and info["base_fingerprint"] == "f" * 32
    assert "trained_steps" not in info
