"""Fisher and RegMean against dense float64 formulas, and the statistics that they are fed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.errors import PlaitError, UnknownNameError
from plait.linalg import LowRank
from plait.merging import merge
from plait.merging.changes import Changes
from plait.merging.methods.fisher import Fisher
from plait.merging.methods.regmean import RegMean
from plait.merging.spaces import align, merge_site
from plait.merging.statistics import fisher, gram, save_statistics, shared_bases

OUT, IN = 9, 12


def low(seed: int, rank: int = 3) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((OUT, rank), (rank, IN)))
    return LowRank(B, A, 0.5 + seed)


def moment(seed: int, rows: int = 30) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, IN, generator=g, dtype=torch.float64)
    return x.mT @ x / rows


def merged(way, lows, statistics, weights, space) -> Tensor:
    found = merge_site(way, Changes("s", lows, statistics=statistics), weights, space)
    return found.dense() if isinstance(found, LowRank) else found


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("space", ["factors", "delta"])
def test_regmean_is_the_least_squares_solution(shrink: float, space: str) -> None:
    lows, grams, weights = [low(1), low(2, 4)], [moment(3), moment(4, 5)], [0.3, 0.9]
    found = merged(RegMean(shrink=shrink, ridge=1e-3), lows, grams, weights, space)

    scaled = [
        w * (shrink * G + (1 - shrink) * torch.diag(G.diag()))
        for w, G in zip(weights, grams, strict=True)
    ]
    ridge = 1e-3 * sum(scaled).diag().mean() / sum(weights)
    scaled = [
        G + w * ridge * torch.eye(IN, dtype=G.dtype) for w, G in zip(weights, scaled, strict=True)
    ]
    right = sum(G @ d.dense().mT for G, d in zip(scaled, lows, strict=True))
    torch.testing.assert_close(
        found, torch.linalg.solve(sum(scaled), right).mT, rtol=1e-6, atol=1e-8
    )


def test_regmean_beats_the_mean_on_its_data_and_ignores_the_grams_scale() -> None:
    lows, grams = [low(1), low(2)], [moment(3), moment(4)]
    way = RegMean(shrink=1.0, ridge=1e-9)

    def error(dW: Tensor) -> float:
        gaps = [dW - d.dense() for d in lows]
        return float(sum((g @ G * g).sum() for g, G in zip(gaps, grams, strict=True)))

    fitted = merged(way, lows, grams, [0.5, 0.5], "factors")
    assert error(fitted) < 0.99 * error((lows[0].dense() + lows[1].dense()) / 2)
    other = merged(way, lows, [7 * G for G in grams], [0.5, 0.5], "factors")
    torch.testing.assert_close(fitted, other)


def test_an_input_without_data_leaves_the_field_to_the_other() -> None:
    grams = [moment(3), torch.zeros(IN, IN, dtype=torch.float64)]
    found = merged(RegMean(ridge=1e-12), [low(1), low(2)], grams, [0.5, 0.5], "factors")
    torch.testing.assert_close(found, low(1).dense(), rtol=1e-5, atol=1e-5)


def test_a_diagonal_gram_is_a_mean_by_columns() -> None:
    a, b = moment(3).diag(), moment(4).diag()
    found = merged(RegMean(ridge=0.0), [low(1), low(2)], [a, b], [0.5, 0.5], "factors")
    expected = (low(1).dense() * a + low(2).dense() * b) / (a + b)
    torch.testing.assert_close(found, expected)


def squares(seed: int, rows: int = OUT) -> Tensor:
    return torch.rand(rows, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fisher_in_entries_is_the_papers_mean() -> None:
    lows, F, weights = [low(1), low(2)], [squares(3), squares(4)], [0.3, 0.9]
    found = merged(Fisher(floor=1e-9), lows, F, weights, "delta")
    total = sum(w * f for w, f in zip(weights, F, strict=True))
    expected = sum(w * f * d.dense() for w, f, d in zip(weights, F, lows, strict=True)) / total
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_fisher_in_shared_coordinates() -> None:
    lows, weights = [low(1, 2), low(2, 2)], [0.3, 0.9]
    U, C = align(lows)
    for way, F in (
        (Fisher(floor=1e-9), [squares(3), squares(4)]),
        (Fisher(floor=1e-9, coordinates="shared"), [squares(3, 4), squares(4, 4)]),
    ):
        inside = [f if way.coordinates == "shared" else (U**2).mT @ f for f in F]
        total = sum(w * f for w, f in zip(weights, inside, strict=True))
        expected = U @ (sum(w * f * c for w, f, c in zip(weights, inside, C, strict=True)) / total)
        torch.testing.assert_close(
            merged(way, lows, F, weights, "aligned"), expected, rtol=1e-6, atol=1e-7
        )


def test_equal_fishers_are_the_mean_and_one_alone_is_its_input() -> None:
    lows = [low(1), low(2)]
    for space in ("aligned", "delta"):
        mean = merged(Fisher(), lows, [squares(3)] * 2, [0.5, 0.5], space)
        torch.testing.assert_close(mean, (lows[0].dense() + lows[1].dense()) / 2)
        only = merged(Fisher(floor=1e-12), lows, [squares(3), 0 * squares(4)], [0.5, 0.5], space)
        torch.testing.assert_close(only, lows[0].dense(), rtol=1e-6, atol=1e-6)


# -- on a model ---------------------------------------------------------------------------------


class Net(nn.Module):
    """Two linears that read one tensor, and one after them; returns logits and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)
        self.o = nn.Linear(5, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        from types import SimpleNamespace

        logits = self.o(torch.tanh(self.q(x)) * self.k(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for i, name in enumerate(("one", "two")):
        adapter = plait.attach(net, "lora", name=name, rank=2, targets="all-linear", seed=i)
        for p in adapter.parameters():
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net


def data(seed: int, rows: int = 7) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(rows, 6, generator=g),
            "labels": torch.randint(0, 4, (rows,), generator=g),
        }
        for _ in range(2)
    ]


def test_grams_are_those_of_the_adapted_model_and_shared(model: nn.Module) -> None:
    before = plait.adapters(model)["one"].state_dict()
    found = gram(model, "one", data(1))
    x = torch.cat([b["x"] for b in data(1)])
    plait.activate(model, "one")
    h = (torch.tanh(model.q(x)) * model.k(x)).detach()
    torch.testing.assert_close(found["q"], x.T @ x / 14)
    torch.testing.assert_close(found["o"], h.T @ h / 14)
    assert found["q"] is found["k"]
    torch.testing.assert_close(gram(model, "one", data(1), form="diagonal")["o"], found["o"].diag())
    assert all(
        torch.equal(v, before[n]) for n, v in plait.adapters(model)["one"].state_dict().items()
    )


def test_fishers_are_mean_squares_of_single_examples_gradients(model: nn.Module) -> None:
    found = fisher(model, "two", data(2))
    bases = shared_bases(model, ["one", "two"])
    turned = fisher(model, "two", data(2), bases=bases, among=["one", "two"])
    dense = model.o.weight.data.double()
    delta = plait.adapters(model)["two"].deltas
    W = {p: (getattr(model, p).weight + delta[p].dense()).detach().double() for p in "qko"}
    total, inside = torch.zeros_like(dense), torch.zeros_like(turned["o"]).double()
    x, y = (torch.cat([b[key] for b in data(2)]) for key in ("x", "labels"))
    for row, label in zip(x.double(), y, strict=True):
        o = W["o"].clone().requires_grad_()
        h = torch.tanh(W["q"] @ row + model.q.bias.double()) * (W["k"] @ row)
        logits = o @ h + model.o.bias.double()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, label), o)
        total += gradient**2 / 14
        inside += (bases["o"].double().T @ gradient) ** 2 / 14
    torch.testing.assert_close(found["o"].double(), total, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(turned["o"].double(), inside, rtol=1e-4, atol=1e-7)
    scaled = fisher(model, "two", data(2), normalize=True)
    assert sum(f.square().sum() for f in scaled.values()).sqrt() == pytest.approx(1, rel=1e-5)


def test_from_files_as_from_memory(model: nn.Module, tmp_path: Path) -> None:
    both = [plait.adapters(model)[n] for n in ("one", "two")]
    found = [gram(model, name, data(i)) for i, name in enumerate(("one", "two"))]
    files = [save_statistics(tmp_path / f"{i}.safetensors", f) for i, f in enumerate(found)]
    a = merge(both, "regmean", statistics=found)
    b = merge(both, "regmean", statistics=files)
    for path, delta in a.deltas.items():
        assert torch.equal(delta.dense(), b.deltas[path].dense())
    size = sum(t.numel() * 4 for t in (found[0]["q"], found[0]["o"]))
    assert files[0].stat().st_size < size + 400, "q and k share one Gram in the file"
    shared = fisher(model, "one", data(0), bases=shared_bases(model, ["one", "two"]))
    merge(both, "fisher", statistics=[shared, shared], coordinates="shared")


def test_what_is_missing_is_named(model: nn.Module, tmp_path: Path) -> None:
    both = [plait.adapters(model)[n] for n in ("one", "two")]
    found = gram(model, "one", data(0))
    with pytest.raises(PlaitError, match="needs statistics of kind gram"):
        merge(both, "regmean")
    with pytest.raises(PlaitError, match="one mapping or file for 2 inputs"):
        merge(both, "regmean", statistics=[found])
    with pytest.raises(PlaitError, match="'o': input 2 has no gram"):
        merge(both, "regmean", statistics=[found, {k: v for k, v in found.items() if k != "o"}])
    with pytest.raises(PlaitError, match="does not exist"):
        merge(both, "regmean", statistics=[found, tmp_path / "none.safetensors"])
    with pytest.raises(PlaitError, match="a fisher statistic is"):
        merge(both, "fisher", statistics=[found, found])
    with pytest.raises(UnknownNameError, match="unknown adapter"):
        gram(model, "three", data(0))


def test_weights_by_site(model: nn.Module) -> None:
    one, two = (plait.adapters(model)[n] for n in ("one", "two"))
    found = merge([one, two], weights=[{"q": 0.5, "o": -1.0}, 0.25])
    for path, weight in {"q": 0.5, "o": -1.0, "k": 1.0}.items():
        expected = weight * one.deltas[path].dense() + 0.25 * two.deltas[path].dense()
        torch.testing.assert_close(found.deltas[path].dense(), expected)
    with pytest.raises(UnknownNameError, match="'x'"):
        merge([one, two], weights=[{"x": 0.5}, 0.25])
