"""Localize-and-Stitch: the stitch against dense float64, masks against autograd, learned masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor, nn

import plait
from plait.errors import PlaitError, UnknownNameError
from plait.linalg import LowRank
from plait.merging import merge
from plait.merging.changes import Changes
from plait.merging.localize import _largest, _part, localize, masked_value
from plait.merging.masks import pack, unpack
from plait.merging.methods.localize_stitch import LocalizeStitch
from plait.merging.search import supervised
from plait.merging.sources import delta_of
from plait.merging.spaces import align, merge_site
from plait.merging.statistics import save_statistics

THIRDS = [1 / 3] * 3


def stitched(parts: list[Tensor], masks: list[Tensor]) -> Tensor:
    """The paper, entry by entry."""
    total = torch.zeros_like(parts[0])
    for at in torch.cartesian_prod(*(torch.arange(n) for n in total.shape)).tolist():
        here = [float(p[*at]) for p, m in zip(parts, masks, strict=True) if m[*at]]
        total[*at] = sum(here) / len(here) if here else 0
    return total


def top(matrix: Tensor, density: float) -> Tensor:
    count = int(density * matrix.numel() + 1e-6)
    return matrix.abs() >= matrix.abs().flatten().sort(descending=True).values[count - 1]


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_the_stitch_is_the_paper_s(density: float) -> None:
    parts = [low.dense() for low in lows(3)]
    wanted = stitched(parts, [top(p, density) for p in parts])
    found = run("localize-stitch", "delta", lows(3), THIRDS, density=density)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    if density == 1:
        torch.testing.assert_close(found, sum(parts) / 3)


def test_aligned_is_the_stitch_of_coordinates() -> None:
    U, parts = align(lows(3))
    wanted = U @ stitched(parts, [top(p, 0.3) for p in parts])
    found = dense(run("localize-stitch", "aligned", lows(3), THIRDS, density=0.3))
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_disjoint_masks_sum_and_those_that_meet_share(k: int) -> None:
    parts = [torch.zeros(4, 4, dtype=torch.float64) for _ in range(k)]
    for i, part in enumerate(parts):
        part[0, 0] = 6.0 + i  # where all meet
        part[1 + i, 1] = 5.0 + i  # an entry of its own
    found = merge_site(
        LocalizeStitch(density=2 / 16), Changes("s", dense=parts), [1 / k] * k, "delta"
    )
    wanted = sum(parts)
    wanted[0, 0] /= k
    torch.testing.assert_close(found, wanted)


def orthogonal(k: int, rank: int) -> list[LowRank]:
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(OUT, k * rank, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(IN, k * rank, generator=g, dtype=torch.float64)).Q
    sizes = torch.linspace(3, 1, rank, dtype=torch.float64)
    cuts = [slice(i * rank, (i + 1) * rank) for i in range(k)]
    return [LowRank(U[:, c] * (sizes + i), V[:, c].mT) for i, c in enumerate(cuts)]


def test_units_that_do_not_meet_are_concatenated_with_weight_one() -> None:
    given = orthogonal(3, 3)
    found = run("localize-stitch", "factors", given, THIRDS, density=1.0)
    assert found.rank == 9
    torch.testing.assert_close(dense(found), sum(low.dense() for low in given))
    found = run("localize-stitch", "factors", given, THIRDS, density=0.34)
    assert found.rank == 3
    wanted = sum(low.truncate(rank=1)[0].dense() for low in given)
    torch.testing.assert_close(dense(found), wanted)


def test_units_share_by_how_much_of_them_the_others_span() -> None:
    given, wanted = lows(3), torch.zeros(OUT, IN, dtype=torch.float64)
    kept = []
    for low in given:
        U, S, Vh = torch.linalg.svd(low.dense(), full_matrices=False)
        count = max(1, low.rank // 2)
        kept.append([(S[a], torch.outer(U[:, a], Vh[a])) for a in range(count)])
    for mine in kept:
        for size, unit in mine:
            met = sum((unit * other).sum() ** 2 for theirs in kept for _, other in theirs)
            wanted += size * unit / met
    found = dense(run("localize-stitch", "factors", given, THIRDS, density=0.5))
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def test_an_input_that_does_not_act_takes_no_share() -> None:
    low = lows(1)[0]
    none = LowRank(low.B[:, :0], low.A[:0])
    for space in ("factors", "aligned", "delta"):
        for absent in (none, low * 0.0):
            found = dense(run("localize-stitch", space, [low, absent], [0.5, 0.5], density=1.0))
            torch.testing.assert_close(found, low.dense(), atol=1e-8, rtol=1e-8)


def test_masks_are_a_bit_for_each_entry() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 7), (8,), (0,), (1, 17)):
        mask = torch.rand(shape, generator=g) < 0.3
        packed = pack(mask)
        assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
        assert torch.equal(unpack(packed, shape, "s"), mask)
        assert torch.equal(unpack(mask, shape, "s"), mask)
    with pytest.raises(PlaitError, match=r"'s': a mask is torch\.uint8"):
        unpack(packed, (9, 9), "s")


def test_the_start_keeps_exactly_the_share() -> None:
    values = torch.ones(1000)
    assert int(_largest(values, 0.01).sum()) == 10, "ties do not overshoot"
    values[[3, 500]] = 2
    assert _largest(values, 0.002).nonzero().flatten().tolist() == [3, 500]


# -- on a model ---------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers; adapter "one" has a good unit and a larger bad one at each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.b(torch.tanh(self.a(x)))
        return y if labels is None else {"y": y}


def loss(model: nn.Module, batch: dict) -> Tensor:
    return (model(batch["x"]) - batch["labels"]).square().mean()


@pytest.fixture
def planted() -> tuple[nn.Module, list[dict]]:
    torch.manual_seed(2)
    model = Model()
    adapter = plait.attach(model, "lora", rank=2, name="one", targets=["a", "b"], bias=True)
    plait.attach(model, "lora", rank=3, name="two", targets=["b"])
    for path in ("a", "b"):
        delta = adapter.deltas[path]
        U = torch.linalg.qr(torch.randn(delta.site.out_features, 2)).Q
        V = torch.linalg.qr(torch.randn(delta.site.in_features, 2)).Q
        low = delta.factors()
        delta.set_pair(V.T * torch.tensor([[1.0], [2.0]]), U / low.scale)
        nn.init.normal_(delta.get_parameter("c"), std=0.1)
    x = torch.randn(40, 8)
    good = {p: adapter.deltas[p].factors() for p in ("a", "b")}
    with torch.no_grad():
        W = {p: model.get_submodule(p).weight + _first(good[p]) for p in good}
        c = {p: model.get_submodule(p).bias + adapter.deltas[p].bias() for p in good}
        y = torch.tanh(x @ W["a"].T + c["a"]) @ W["b"].T + c["b"]
    return model, [{"x": x, "labels": y}]


def _first(low: LowRank) -> Tensor:
    return low.scale * torch.outer(low.B[:, 0], low.A[0])


@pytest.mark.parametrize("units", ["ranks", "entries"])
def test_the_gradient_of_the_masks_is_the_formula_s(planted, units: str) -> None:
    """dL/dz = <dL/dW, dW> sigma (1 - sigma) by parts, with dL/dW of a model that has W written."""
    model, batches = planted
    own = plait.adapters(model)["one"]
    plait.activate(model, {})
    with torch.no_grad():
        parts = [_part(d, delta_of(own, "one", d.site), units) for d in own.deltas.values()]
    z = torch.randn(sum(len(p.sizes) for p in parts)).requires_grad_()
    value = masked_value(model, parts, supervised(batches, loss), z, 0)
    (found,) = torch.autograd.grad(value, z)

    written, wanted = Model(), []
    written.load_state_dict({k: v for k, v in model.state_dict().items() if "plait" not in k})
    pieces = z.detach().split([len(p.sizes) for p in parts])
    split = {}
    for (path, delta), piece in zip(own.deltas.items(), pieces, strict=True):
        U, S, Vh = torch.linalg.svd(delta.dense().detach(), full_matrices=False)
        single = [S[j] * torch.outer(U[:, j], Vh[j]) for j in range(2)]
        dense = delta.dense().detach().flatten()
        if units == "entries":
            single = [torch.zeros(len(dense)) for _ in dense]
            for j, one in enumerate(single):
                one[j] = dense[j]
        split[path] = [one.view(delta.site.shape) for one in single]
        with torch.no_grad():
            layer = written.get_submodule(path)
            layer.bias += delta.bias()
            layer.weight += sum(
                s * one for s, one in zip(piece.sigmoid(), split[path], strict=True)
            )
    direct = loss(written, batches[0])
    direct.backward()
    for path, piece in zip(own.deltas, pieces, strict=True):
        s = piece.sigmoid()
        g = written.get_submodule(path).weight.grad
        inner = torch.stack([(g * one).sum() for one in split[path]])
        wanted.append(inner * s * (1 - s))
    torch.testing.assert_close(value, direct)
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=1e-4)


def test_learning_finds_the_unit_that_matters_and_the_largest_does_not(planted) -> None:
    model, batches = planted
    before = {k: v.clone() for k, v in model.state_dict().items()}
    largest = localize(model, "one", density=0.5)
    assert all(unpack(m, (2,), p).tolist() == [True, False] for p, m in largest.items())
    found = localize(model, "one", supervised(batches, loss), density=0.5, steps=80, among=["two"])
    assert all(unpack(m, (2,), p).tolist() == [False, True] for p, m in found.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sparse = localize(model, "one", supervised(batches, loss), steps=80, l1=100.0)
    assert not any(unpack(m, (2,), p).any() for p, m in sparse.items())
    exact = localize(model, "one", supervised(batches, loss), steps=80, keep="density", density=0.5)
    assert sum(int(unpack(m, (2,), p).sum()) for p, m in exact.items()) == 2


def test_learned_masks_merge_in_the_space_of_their_units(planted, tmp_path: Path) -> None:
    model, batches = planted
    both = [plait.adapters(model)[n] for n in ("one", "two")]
    nn.init.normal_(both[1].deltas["b"].B)
    ask = supervised(batches, loss)
    given = {"steps": 80, "density": 0.5}
    masks = [
        localize(model, "one", ask, among=["one", "two"], **given),
        localize(model, "two", density=0.34, among=["one", "two"]),
    ]
    files = [save_statistics(tmp_path / f"{i}.safetensors", m) for i, m in enumerate(masks)]
    assert files[0].stat().st_size < 400
    found = merge(both, "localize-stitch", statistics=files, masks="learned")
    assert found.deltas["a"].rank == 1 and found.deltas["b"].rank == 2
    one = _first(both[0].deltas["a"].factors())
    torch.testing.assert_close(found.deltas["a"].dense(), one, atol=1e-5, rtol=1e-5)

    entries = [
        localize(model, n, ask, units="entries", among=["one", "two"], **given)
        for n in ("one", "two")
    ]
    found = merge(
        both, "localize-stitch", statistics=entries, masks="learned", space="delta", rank=4
    )
    parts = [a.deltas["b"].dense() for a in both]
    wanted = stitched([p.detach() for p in parts], [unpack(m["b"], (4, 6), "b") for m in entries])
    torch.testing.assert_close(found.deltas["b"].dense(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(PlaitError, match="'a': a mask is"):
        merge(both, "localize-stitch", statistics=entries, masks="learned")
    with pytest.raises(PlaitError, match="needs statistics of kind mask"):
        merge(both, "localize-stitch", masks="learned")


def test_what_cannot_be_localized_is_refused(planted) -> None:
    model, _ = planted
    with pytest.raises(UnknownNameError, match="unknown units"):
        localize(model, "one", units="rows")
    with pytest.raises(UnknownNameError, match="unknown adapter"):
        localize(model, "three")
    with pytest.raises(PlaitError, match="density"):
        localize(model, "one", density=0.0)
    with pytest.raises(PlaitError, match="share in"):
        run("localize-stitch", "factors", lows(2), density=0.0)
