"""WIDEN and Arcee Fusion, which read the base, against the papers' formulas in dense float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge_kit import IN, base_weight, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging import merge_checkpoints
from plait.merging.changes import Changes
from plait.merging.methods.arcee_fusion import importance, quartiles
from plait.merging.methods.widen import Widen
from plait.merging.spaces import merge_site

THIRDS = [1 / 3] * 3


def calibrated(q: Tensor, t: float, v: float) -> Tensor:
    shares = q.softmax(0)
    for i in range(len(q)):
        shares[i][q[i] > t * q[i].mean() + 1e-12] = v
    return shares


def widen_by_hand(W: Tensor, deltas: list[Tensor], t: float = 1.0, v: float = 1.0) -> Tensor:
    """The paper on whole matrices: norms and cosines of the columns of W0 + dW, stable sorts."""
    n, scores = W.shape[1], []
    for kind in ("magnitude", "direction"):
        q = torch.zeros(len(deltas), n, dtype=torch.float64)
        for i, delta in enumerate(deltas):
            if kind == "magnitude":
                moved = ((W + delta).norm(dim=0) - W.norm(dim=0)).abs()
            else:
                moved = 1 - torch.cosine_similarity(W + delta, W, dim=0)
            q[i, moved.argsort(stable=True)] = torch.arange(n, dtype=torch.float64) / n
        scores.append(calibrated(q, t, v))
    share = (scores[0] + scores[1]) / 2
    return sum(delta * s for delta, s in zip(deltas, share, strict=True))


def vectors_by_hand(deltas: list[Tensor], t: float = 1.0, v: float = 1.0) -> Tensor:
    stacked = torch.stack(deltas)
    return (stacked * calibrated(stacked.abs(), t, v)).sum(0)


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize(("t", "v"), [(1.0, 1.0), (0.6, 0.4), (1.3, 1.0), (9.0, 1.0)])
def test_widen_is_the_paper_s(space: str, t: float, v: float) -> None:
    wanted = widen_by_hand(base_weight(), [low.dense() for low in lows(3)], t, v)
    found = dense(run("widen", space, lows(3), THIRDS, threshold=t, value=v))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_widen_of_one_input_returns_it(space: str) -> None:
    for value in (1.0, 0.0):
        found = run("widen", space, lows(1), [1.0], threshold=9.0, value=value)
        torch.testing.assert_close(dense(found), lows(1)[0].dense(), atol=1e-12, rtol=1e-12)
    found = dense(run("widen", space, lows(1), [1.0]))
    torch.testing.assert_close(found, lows(1)[0].dense(), atol=1e-12, rtol=1e-12)


def test_copies_count_several_times_where_they_moved_more_than_their_mean() -> None:
    """The paper's over-counting: every copy gets the full score on its upper columns."""
    low = lows(1)[0]
    found = dense(run("widen", "factors", [low] * 3, THIRDS))
    W, delta = base_weight(), low.dense()
    grown = ((W + delta).norm(dim=0) - W.norm(dim=0)).abs()
    turned = 1 - torch.cosine_similarity(W + delta, W, dim=0)
    times = sum(1.0 + 2.0 * (moved > moved.median()) for moved in (grown, turned)) / 2
    assert set(times.tolist()) == {1.0, 2.0, 3.0}
    torch.testing.assert_close(found, delta * times, atol=1e-10, rtol=1e-10)


def test_a_high_threshold_shares_every_column_and_a_low_one_gives_all_the_value() -> None:
    one, two = lows(2)
    way = Widen(threshold=9.0)
    found = way._of_columns(*facts([one, two]))
    torch.testing.assert_close(found.sum(0), torch.ones(IN, dtype=torch.float64))
    assert bool(((found > 0) & (found < 1)).all())
    scores = Widen(threshold=1.0)._of_columns(*facts([one, two]))
    assert bool(((scores > 0) & (scores <= 1)).all())


def facts(given: list[LowRank], W: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    W = base_weight() if W is None else W
    deltas = torch.stack([low.dense() for low in given])
    return W.square().sum(0), (W * deltas).sum(1), deltas.square().sum(1)


def test_ranks_do_not_see_how_large_a_small_change_is() -> None:
    one, two = lows(2)
    large, small = (Widen()._of_columns(*facts([one, two * f])) for f in (1e-3, 1e-5))
    assert float((large == small).double().mean()) > 0.9
    doubled = Widen()._of_columns(*facts([one, two * 1e-5 * 2]))
    torch.testing.assert_close(doubled, small)


def test_small_changes_in_float32_keep_their_ranks() -> None:
    """1 - cos of changes of 1e-5 is 1e-10, far below what a float32 cosine can tell from 0."""
    exact = [low * 1e-6 for low in lows(2)]
    rough = [low.to(dtype=torch.float32) for low in exact]
    W = base_weight()
    made = []
    for given in (exact, rough):
        changes = Changes("s", given, original=W.to(given[0].dtype))
        made.append(dense(merge_site(Widen(), changes, [0.5, 0.5], "factors")).double())
    torch.testing.assert_close(made[1], made[0], atol=1e-5 * float(made[0].abs().max()), rtol=0)
    wanted = widen_by_hand(W, [low.dense() for low in exact])
    torch.testing.assert_close(made[0], wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


def test_columns_of_zeros_and_inputs_that_do_not_act_are_guarded() -> None:
    W = base_weight()
    W[:, [0, 5]] = 0
    one, two = lows(2)
    two = LowRank(two.B, two.A * (torch.arange(IN) > 2), two.scale)  # columns 0 to 2 stay
    for space in ("factors", "delta"):
        changes = Changes("s", [one, two], original=W)
        found = dense(merge_site(Widen(), changes, [0.5, 0.5], space))
        assert bool(torch.isfinite(found).all())
        changes = Changes("s", [one, two * 0.0], original=W)
        found = dense(merge_site(Widen(), changes, [0.5, 0.5], space))
        torch.testing.assert_close(found, one.dense())


def checkpoints(folder: Path) -> dict[str, dict[str, Tensor]]:
    made = {}
    for seed, name in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(seed)
        shapes = {
            "model.embed_tokens.weight": (20, 8),
            "up.weight": (12, 8),
            "up.bias": (12,),
            "norm.weight": (8,),
        }
        made[name] = {n: torch.randn(*s, generator=g) for n, s in shapes.items()}
        (folder / name).mkdir()
        save_file(made[name], folder / name / "model.safetensors")
    return made


def test_full_checkpoints_take_tokens_as_columns_and_vectors_entry_by_entry(tmp_path) -> None:
    made = checkpoints(tmp_path)
    inputs = [tmp_path / "a", tmp_path / "b"]
    out = merge_checkpoints(inputs, tmp_path / "out", "widen", base=tmp_path / "base")
    found = load_file(next(out.glob("*.safetensors")))
    for name, tensor in made["base"].items():
        W = tensor.double()
        deltas = [made[i][name].double() - W for i in ("a", "b")]
        if W.dim() == 1:
            wanted = W + vectors_by_hand(deltas)
        elif "embed" in name:
            wanted = W + widen_by_hand(W.T, [d.T for d in deltas]).T
        else:
            wanted = W + widen_by_hand(W, deltas)
        torch.testing.assert_close(found[name].double(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(PlaitError, match="'widen' reads the base's weights; give base="):
        merge_checkpoints(inputs, tmp_path / "none", "widen")
    with pytest.raises(PlaitError, match="threshold"):
        run("widen", "factors", lows(2), threshold=-1.0)


def test_a_row_alone_is_a_vector_also_in_factors() -> None:
    given = [LowRank(low.B[:1], low.A, low.scale) for low in lows(2)]
    wanted = vectors_by_hand([low.dense() for low in given])
    for space in ("factors", "delta"):
        found = dense(merge_site(Widen(), Changes("s", given), [0.5, 0.5], space))
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def fusion_by_hand(W: Tensor, deltas: list[Tensor], weights: list[float], factor: float) -> Tensor:
    total = torch.zeros_like(W)
    for delta, w in zip(deltas, weights, strict=True):
        p, q = (W + delta).log_softmax(-1), W.log_softmax(-1)
        importance = delta.abs() * (p.exp() * (p - q)).sum(-1, keepdim=True)
        q1, middle, q3 = importance.flatten().quantile(torch.tensor([0.25, 0.5, 0.75]).double())
        total += w * torch.where(importance >= middle + factor * (q3 - q1), delta, 0)
    return total


@pytest.mark.parametrize("factor", [1.5, 0.0, -0.4])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_fusion_keeps_what_stands_out(factor: float, size: float) -> None:
    given, weights = [low * size for low in lows(3)], [1.0, -0.4, 0.3]
    wanted = fusion_by_hand(base_weight(), [low.dense() for low in given], weights, factor)
    found = run("arcee-fusion", "delta", given, weights, factor=factor)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)
    assert bool((found != 0).any()) and (factor < 0 or bool((found == 0).any()))


def test_divergences_of_tiny_changes_keep_their_digits() -> None:
    delta, W = lows(1)[0].dense() * 1e-8, base_weight()
    q = W.softmax(-1)
    variance = (q * delta**2).sum(-1) - (q * delta).sum(-1) ** 2  # KL is half of it, to 1e-8
    wanted = delta.abs() * (variance / 2)[:, None]
    found = importance(delta[None], W)[0].double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_quartiles_in_passes_are_those_of_a_sort() -> None:
    g = torch.Generator().manual_seed(1)
    values = torch.rand(2, 9, 11, generator=g)
    for at in (values, values[:, :2, :2]):
        parts = [at[:, i : i + 4] for i in range(0, at.shape[1], 4)]
        held = quartiles(lambda parts=parts: iter(parts), 2, at[0].numel())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plait.merging.methods.arcee_fusion.IN_MEMORY", 0)
            passes = quartiles(lambda parts=parts: iter(parts), 2, at[0].numel())
        sort = at.double().flatten(1).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), 1)
        for a, b, c in zip(held, passes, sort, strict=True):
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, c)


def test_a_model_like_its_base_is_the_base_and_a_shifted_row_does_not_count(tmp_path) -> None:
    made = checkpoints(tmp_path)
    out = merge_checkpoints(
        [tmp_path / "a"], tmp_path / "out", "arcee-fusion", base=tmp_path / "base"
    )
    found = load_file(next(out.glob("*.safetensors")))
    for name, tensor in made["base"].items():
        W = tensor.double().reshape(-1, tensor.shape[-1])
        delta = made["a"][name].double().reshape(W.shape) - W
        wanted = (W + fusion_by_hand(W, [delta], [1.0], 1.5)).reshape(tensor.shape)
        torch.testing.assert_close(found[name].double(), wanted, atol=1e-5, rtol=1e-5)
    nothing = [low * 0.0 for low in lows(2)]
    assert not run("arcee-fusion", "delta", nothing).any()
    shift = torch.ones(1, IN, dtype=torch.float64) * 3
    low = LowRank(torch.randn(14, 1, dtype=torch.float64), shift)
    sizes = importance(low.dense()[None], base_weight())
    assert float(sizes.max()) < 1e-12
