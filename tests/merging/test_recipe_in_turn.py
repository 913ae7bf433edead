"""Methods that take their inputs in turn: the same merge, one input in memory at a time."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.linalg import LowRank
from plait.merging import merge_checkpoints
from plait.merging.checkpoints import Checkpoint
from plait.merging.methods.opcm import Arrivals

SHAPES = {"up.weight": (12, 8), "down.weight": (8, 12), "norm.weight": (8,)}


def write(folder: Path, seed: int, rank: int = 3) -> dict[str, Tensor]:
    """A base (seed 0), or the base plus a change of low rank."""
    g = torch.Generator().manual_seed(0)
    made = {n: torch.randn(*s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}
    g = torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items() if seed else ():
        if len(shape) == 1:
            made[name] += torch.randn(*shape, generator=g, dtype=torch.float64)
        else:
            B = torch.randn(shape[0], rank, generator=g, dtype=torch.float64)
            made[name] += B @ torch.randn(rank, shape[1], generator=g, dtype=torch.float64)
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    return made


def models(folder: Path, count: int, rank: int = 3) -> tuple[list[Path], list[dict[str, Tensor]]]:
    paths = [folder / f"m{i}" for i in range(count + 1)]
    return paths, [write(path, i, rank) for i, path in enumerate(paths)]


@pytest.mark.parametrize("most", [None, 4])
def test_checkpoints_in_turn_are_the_factors_merge(tmp_path: Path, most: int | None) -> None:
    paths, made = models(tmp_path, 3)
    out = merge_checkpoints(paths[1:], tmp_path / "out", "opcm", base=paths[0], most=most)
    found = load_file(out / "model.safetensors")
    for name in SHAPES:
        deltas = [m[name] - made[0][name] for m in made[1:]]
        if made[0][name].dim() == 1:
            wanted = sum(deltas) / 3
        else:
            so_far = Arrivals(0.5, most)
            for delta in deltas:
                U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
                so_far.add({"": LowRank(U[:, :3] * S[:3], Vh[:3])})
            wanted = so_far.merged[""].dense()
        torch.testing.assert_close(found[name] - made[0][name], wanted, atol=1e-9, rtol=1e-9)
    facts = json.loads((out / "merge.json").read_text())["sites"]["up.weight"]
    norms = [float((m["up.weight"] - made[0]["up.weight"]).norm()) for m in made[1:]]
    assert facts["norms"] == pytest.approx(norms, rel=1e-4)


def test_full_rank_checkpoints_follow_the_paper(tmp_path: Path) -> None:
    paths, made = models(tmp_path, 2, rank=8)
    out = merge_checkpoints(paths[1:], tmp_path / "out", "opcm", base=paths[0], alpha=0.4)
    first, second = (m["up.weight"] - made[0]["up.weight"] for m in made[1:])
    U, S, Vh = torch.linalg.svd(first, full_matrices=False)
    split = int((S.cumsum(0) <= 0.4 * S.sum()).sum())
    P = U.T @ second @ Vh.T
    kept = P.clone()
    kept[range(8), range(8)] = 0
    kept[:split, :split] = 0
    total = first + second - U @ (P - kept) @ Vh
    wanted = total * (float(first.norm()) + float(second.norm())) / 2 / float(total.norm())
    found = load_file(out / "model.safetensors")["up.weight"] - made[0]["up.weight"]
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def held_at_once(folder: Path, method: str, count: int) -> int:
    """The most tensors of one name that are alive at a time while `count` inputs are merged."""
    folder.mkdir()
    paths, _ = models(folder, count)
    real, alive, most = Checkpoint.read, weakref.WeakSet(), [0]

    def read(self: Checkpoint, name: str) -> Tensor:
        found = real(self, name)
        if name == "up.weight":
            gc.collect()
            alive.add(found)
            most[0] = max(most[0], len(alive))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", read)
        merge_checkpoints(paths[1:], folder / "out", method, base=paths[0])
    return most[0]


def test_what_is_held_does_not_grow_with_the_inputs(tmp_path: Path) -> None:
    few, many = (held_at_once(tmp_path / f"opcm{n}", "opcm", n) for n in (3, 9))
    assert few == many <= 4
    assert held_at_once(tmp_path / "linear", "linear", 9) >= 10
