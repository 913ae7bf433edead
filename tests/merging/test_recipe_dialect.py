"""Every merge_method of recipes against its description in dense float64, to rounding.

The same files were run with mergekit 0.1.5 and agree with it to 1e-5, or in law where methods draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from recipe_models import loaded, names, write_model
from torch import Tensor

from plait.merging.recipes import merge_recipe
from plait.merging.recipes.dialect import DIALECT

WEIGHTS = {"a": 0.7, "b": 0.4, "c": 0.3}


def arc(t: float, x: Tensor, y: Tensor) -> Tensor:
    angle = math.acos(max(-1.0, min(1.0, float((x * y).sum() / (x.norm() * y.norm())))))
    if math.cos(angle) > 0.9995:
        return (1 - t) * x + t * y
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def lines(t: float, x: Tensor, y: Tensor, dim: int) -> Tensor:
    """An arc for every row (1) or column (0); vectors whole."""
    if x.dim() == 1:
        return arc(t, x, y)
    pairs = zip(x.unbind(1 - dim), y.unbind(1 - dim), strict=True)
    return torch.stack([arc(t, a, b) for a, b in pairs], 1 - dim)


def kept(delta: Tensor, density: float, gamma: float = 0.0) -> Tensor:
    order = delta.abs().flatten().argsort(descending=True)
    count = max(1, int(density * delta.numel() + 1e-9))
    first = min(int(gamma * delta.numel() + 1e-9), delta.numel() - count)
    made = torch.zeros(delta.numel(), dtype=delta.dtype)
    made[order[first : first + count]] = delta.flatten()[order[first : first + count]]
    return made.view_as(delta)


def elected(deltas: Sequence[Tensor], weights: Sequence[float], mean: bool) -> Tensor:
    stacked = torch.stack(list(deltas))
    w = torch.tensor(list(weights)).double().view(-1, *[1] * (stacked.dim() - 1))
    sign = torch.where((w * stacked).sum(0) >= 0, 1.0, -1.0)
    agree = (stacked.sign() == sign) & (stacked != 0)
    total = (w * agree).sum(0) if mean else torch.ones(())
    return (w * stacked * agree).sum(0) / torch.where(total != 0, total, 1.0)


def summed(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True))  # type: ignore[return-value]


def stock(base: Tensor, models: Sequence[Tensor], rows: bool) -> Tensor:
    deltas = [m - base for m in models]
    dim = 1 if rows and base.dim() > 1 else tuple(range(base.dim()))
    pairs = [(0, 1), (0, 2), (1, 2)]
    norms = [d.norm(dim=dim, keepdim=True) for d in deltas]
    cosines = [
        (deltas[i] * deltas[j]).sum(dim, keepdim=True) / norms[i] / norms[j] for i, j in pairs
    ]
    c = sum(cosines) / 3
    return base + 3 * c / (1 + 2 * c) * sum(deltas) / 3


def sphere(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean direction, with the weighted mean length."""
    mean = sum(w * m / m.norm() for w, m in zip(weights, models, strict=True))
    return mean / mean.norm() * sum(w * m.norm() for w, m in zip(weights, models, strict=True))


def karcher(models: Sequence[Tensor]) -> Tensor:
    units = [m / m.norm() for m in models]
    mean = sum(units) / sum(units).norm()
    for _ in range(200):
        logs = []
        for unit in units:
            cosine = float((unit * mean).sum().clamp(-1, 1))
            angle = math.acos(cosine)
            logs.append((unit - cosine * mean) * (angle / math.sin(angle) if angle else 1.0))
        step = sum(logs) / len(logs)
        size = float(step.norm())
        if size < 1e-9:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
    return mean * sum(m.norm() for m in models) / len(models)


def sce(base: Tensor, models: Sequence[Tensor], share: float) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    spread = kept(deltas.var(0, correction=0), share) != 0
    chosen = deltas * spread
    energy = chosen.square().flatten(1).sum(1)
    w = (energy / energy.sum()).view(-1, *[1] * base.dim())
    sign = torch.where(chosen.sum(0) >= 0, 1.0, -1.0)
    agree = (chosen.sign() == sign) & (chosen != 0)
    total = (w * agree).sum(0)
    return base + (w * chosen * agree).sum(0) / torch.where(total > 0, total, 1.0)


Models = dict[str, Tensor]
W = list(WEIGHTS.values())


def changes(m: Models) -> list[Tensor]:
    return [m[k] - m["base"] for k in "abc"]


CASES: dict[str, tuple[str, str, str, Callable[[Models], Tensor]]] = {
    "linear": ("linear", "abc", "", lambda m: summed([m[k] for k in "abc"], W) / sum(W)),
    "task_arithmetic": (
        "task_arithmetic",
        "abc",
        "{lambda: 0.5}",
        lambda m: m["base"] + 0.5 * summed(changes(m), W),
    ),
    "task_arithmetic normalized": (
        "task_arithmetic",
        "abc",
        "{normalize: true}",
        lambda m: m["base"] + summed(changes(m), W) / sum(W),
    ),
    "ties summed": (
        "ties",
        "abc",
        "{density: 0.5, normalize: false}",
        lambda m: m["base"] + elected([kept(d, 0.5) for d in changes(m)], W, mean=False),
    ),
    "breadcrumbs": (
        "breadcrumbs",
        "abc",
        "{density: 0.7, gamma: 0.1}",
        lambda m: m["base"] + summed([kept(d, 0.7, 0.1) for d in changes(m)], W),
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        "abc",
        "{density: 0.7, gamma: 0.1}",
        lambda m: m["base"] + elected([kept(d, 0.7, 0.1) for d in changes(m)], W, mean=False),
    ),
    "dare_linear whole": ("dare_linear", "abc", "", lambda m: m["base"] + summed(changes(m), W)),
    "dare_ties whole": (
        "dare_ties",
        "abc",
        "{density: 1}",
        lambda m: m["base"] + elected(changes(m), W, mean=False),
    ),
    "della whole": ("della", "abc", "", lambda m: m["base"] + elected(changes(m), W, mean=True)),
    "della_linear whole": (
        "della_linear",
        "abc",
        "{normalize: true}",
        lambda m: m["base"] + summed(changes(m), W) / sum(W),
    ),
    "model_stock": (
        "model_stock",
        "abc",
        "",
        lambda m: stock(m["base"], [m[k] for k in "abc"], rows=False),
    ),
    "model_stock by row": (
        "model_stock",
        "abc",
        "{filter_wise: true}",
        lambda m: stock(m["base"], [m[k] for k in "abc"], rows=True),
    ),
    "slerp": ("slerp", "a", "{t: 0.3}", lambda m: arc(0.3, m["base"], m["a"])),
    "nuslerp": (
        "nuslerp",
        "ab",
        "",
        lambda m: m["base"] + arc(4 / 11, m["a"] - m["base"], m["b"] - m["base"]),
    ),
    "nuslerp by row": (
        "nuslerp",
        "ab",
        "{nuslerp_flatten: false}",
        lambda m: m["base"] + lines(4 / 11, m["a"] - m["base"], m["b"] - m["base"], 1),
    ),
    "nuslerp by column": (
        "nuslerp",
        "ab",
        "{nuslerp_flatten: false, nuslerp_row_wise: true}",
        lambda m: m["base"] + lines(4 / 11, m["a"] - m["base"], m["b"] - m["base"], 0),
    ),
    "multislerp": (
        "multislerp",
        "abc",
        "",
        lambda m: m["base"] + sphere(changes(m), [w / sum(W) for w in W]),
    ),
    "karcher": (
        "karcher",
        "abc",
        "{max_iter: 200, tol: 1e-9}",
        lambda m: karcher([m[k] for k in (*"abc", "base")]),
    ),
    "sce": (
        "sce",
        "abc",
        "{select_topk: 0.5}",
        lambda m: sce(m["base"], [m[k] for k in "abc"], 0.5),
    ),
    "nearswap": (
        "nearswap",
        "a",
        "{t: 0.02}",
        lambda m: m["base"] + (m["a"] - m["base"]).clamp(-0.02, 0.02),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    base = write_model(made / "base", 0, 2)
    for i, name in enumerate("abc", 1):
        write_model(made / name, i, 2, of=base)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_method_of_recipes(folder: Path, tmp_path: Path, case: str, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    method, models, parameters, wanted = CASES[case]
    listed = "".join(f"  - {{model: {k}, parameters: {{weight: {WEIGHTS[k]}}}}}\n" for k in models)
    base = "" if method == "linear" else "base_model: base\n"
    text = f"merge_method: {method}\n{base}models:\n{listed}"
    text += f"parameters: {parameters}\n" if parameters else ""
    (tmp_path / "r.yml").write_text(text)
    found = loaded(merge_recipe(tmp_path / "r.yml", tmp_path / "out").path)
    given = {k: loaded(folder / k) for k in ("base", *"abc")}
    for name in names(2):
        dense = {k: m[name].double() for k, m in given.items()}
        # Ends of a selection differ where float32 differences tie: compare what is not at one.
        torch.testing.assert_close(found[name].double(), wanted(dense), atol=2e-5, rtol=2e-5)


def test_every_method_but_the_ones_below_is_tried() -> None:
    elsewhere = {"ties", "passthrough", "arcee_fusion"}  # in files, and with its method
    assert {case.partition(" ")[0] for case in CASES} | elsewhere == set(DIALECT)


def test_density_zero_takes_no_part(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "  - {model: a, parameters: {density: 0}}\n  - {model: b, parameters: {density: [0, 1]}}\n"
        "parameters: {weight: 0.5}\n"
    )
    (tmp_path / "r.yml").write_text(text)
    found = loaded(merge_recipe(tmp_path / "r.yml", tmp_path / "out").path)
    base, b = loaded(folder / "base"), loaded(folder / "b")
    for name in names(2):
        wanted = b if ".1." in name else base  # at depth 0 nothing of b stays either
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_drawn_masks_keep_the_share_and_the_sum_of_magnitudes(
    folder: Path, tmp_path: Path, method: str, monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    text = (
        f"merge_method: {method}\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: 1, density: 0.5}}]\n"
    )
    (tmp_path / "r.yml").write_text(text)
    found = loaded(merge_recipe(tmp_path / "r.yml", tmp_path / "out").path)
    base, a = loaded(folder / "base"), loaded(folder / "a")
    stays = total = 0
    for name in names(2):
        delta, made = (x[name].double() - base[name].double() for x in (a, found))
        torch.testing.assert_close(made.abs().sum(), delta.abs().sum(), rtol=1e-4, atol=1e-4)
        big = delta.abs() > 1e-4  # of smaller ones float32 cannot tell
        stays, total = stays + int((made.abs() > 1e-6)[big].sum()), total + int(big.sum())
    assert abs(stays / total - 0.5) < 5 * 0.5 / math.sqrt(total) + 0.02
