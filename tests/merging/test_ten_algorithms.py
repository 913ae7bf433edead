"""The ten algorithms of OptMerge's benchmark, by their names, against dense float64 formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from test_quadratic import by_pinv, gap, optmerge_by_hand
from test_spectral import tsv_by_hand
from torch import Tensor

import plait
from plait.adapter.convert import lora_from
from plait.adapter.site import LinearSite
from plait.errors import PlaitError
from plait.linalg import LowRank, key_of, uniform_at
from plait.merging import get_merge_method, merge_method_names
from plait.merging.aliases import ALIASES
from plait.merging.changes import Changes
from plait.merging.method import make_merge
from plait.merging.spaces import merge_site

K = 3
MEAN = [1 / K] * K


def ties_by_hand(taus: list[Tensor], density: float) -> Tensor:
    kept = []
    for t in taus:
        least = t.abs().flatten().topk(int(density * t.numel())).values[-1]
        kept.append(t * (t.abs() >= least))
    return elected(kept)


def elected(kept: list[Tensor]) -> Tensor:
    stack = torch.stack(kept)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack * sign > 0
    return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)


def dropped(taus: list[Tensor], density: float) -> list[Tensor]:
    """DARE's masks are drawn by position, so an oracle can draw the same ones."""
    found = []
    for i, t in enumerate(taus):
        numbers = uniform_at(key_of(3, "site", "dare", i), range(OUT), IN)
        found.append(t * (numbers < density) / density)
    return found


def iso(taus: list[Tensor], rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(taus) / K)
    return S[:rank].mean() * U[:, :rank] @ Vh[:rank]


ORACLES: dict[str, tuple[dict, Callable[[list[Tensor]], Tensor]]] = {
    "average": ({}, lambda taus: sum(taus) / K),
    "task_arithmetic": ({"weights": [0.4] * K}, lambda taus: 0.4 * sum(taus)),
    "ties": ({"density": 0.2}, lambda taus: ties_by_hand(taus, 0.2)),
    "dare_linear": ({"density": 0.8}, lambda taus: sum(dropped(taus, 0.8)) / K),
    "dare_ties": ({"density": 0.8}, lambda taus: elected(dropped(taus, 0.8))),
    "tsv_m": ({"damping": 0.0}, lambda taus: tsv_by_hand(taus, [3, 2, 4], [1.0] * K)),
    "iso_c": ({}, lambda taus: iso(taus, 9)),
    "wudi": ({"solver": "exact"}, lambda taus: by_pinv(taus, MEAN)),
    "optmerge": ({}, lambda taus: optmerge_by_hand(taus, MEAN, OUT // K, False, 300.0)),
    "naive_mc": ({}, lambda taus: sum(taus) / K),
    "damc": ({"decoupled": ["site"]}, sum),
}


@pytest.mark.parametrize("name", ORACLES)
def test_each_of_them_is_its_dense_formula(name: str) -> None:
    options, formula = ORACLES[name]
    given = lows(K)
    taus = [low.dense() for low in given]
    weights = dict(options).pop("weights", MEAN)
    rest = {key: value for key, value in options.items() if key != "weights"}
    assert gap(run(name, "delta", given, weights, **rest), formula(taus)) < 1e-6


@pytest.mark.parametrize("name", ORACLES)
def test_adapters_of_two_sites_merge_by_each_name(name: str) -> None:
    options = dict(ORACLES[name][0])
    weights = options.pop("weights", None)
    sites = [LinearSite(f"layers.{i}.proj", (OUT, IN)) for i in range(2)]
    adapters = [
        lora_from(f"a{i}", sites, {s.path: low for s in sites}, {}) for i, low in enumerate(lows(K))
    ]
    merged = plait.merge(adapters, name, weights, space="delta", rank=OUT, seed=3, **options)
    assert merged.info["merge"]["method"] == name.replace("_", "-")
    way = make_merge(get_merge_method(name), options)
    for site in sites:
        changes = Changes(site.path, [low.to(dtype=torch.float32) for low in lows(K)], seed=3)
        wanted = merge_site(way, changes, weights or MEAN, "delta")
        assert gap(merged.deltas[site.path].dense().detach(), dense(wanted)) < 1e-5


# -- other names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_the_method_with_its_options(name: str) -> None:
    meant, options = ALIASES[name]
    assert name not in merge_method_names(), "a method's own name needs no alias"
    for spelt in (name, name.replace("-", "_"), name.upper()):
        assert get_merge_method(spelt).name == name
    for space in make_merge(get_merge_method(name), {}).spaces:
        a, b = run(name, space, lows(K)), run(meant, space, lows(K), **options)
        torch.testing.assert_close(dense(a), dense(b), rtol=0, atol=0)


def test_options_that_are_given_win_over_those_of_an_alias() -> None:
    way = make_merge(get_merge_method("swudi"), {"keep": 0.85})
    assert way.keep == 0.85 and make_merge(get_merge_method("swudi"), {}).keep == 0.65


def test_an_unknown_name_may_be_near_an_alias() -> None:
    with pytest.raises(PlaitError, match="did you mean 'dare-ties'"):
        get_merge_method("dare_tie")


# -- modalities -----------------------------------------------------------------------------------


def test_what_one_modality_has_alone_is_kept_whole() -> None:
    sites = {name: LinearSite(name, (OUT, IN)) for name in ("audio.proj", "image.proj", "lm.q")}
    audio, image = lows(2)
    made = []
    for name, low in (("audio", audio), ("image", image)):
        own = [sites[f"{name}.proj"], sites["lm.q"]]
        made.append(lora_from(name, own, {site.path: low for site in own}, {}))
    merged = plait.merge(made, "naive-mc")
    found = {path: delta.dense().detach().double() for path, delta in merged.deltas.items()}
    assert gap(found["audio.proj"], audio.dense()) < 1e-6
    assert gap(found["image.proj"], image.dense()) < 1e-6
    assert gap(found["lm.q"], (audio.dense() + image.dense()) / 2) < 1e-6
    adjusted = plait.merge(made, "damc", weights=[0.7, 0.3])
    change = adjusted.deltas["lm.q"].dense().detach().double()
    assert gap(change, 0.7 * audio.dense() + 0.3 * image.dense()) < 1e-6
    apart = plait.merge(made, "damc", decoupled=["q"])
    change = apart.deltas["lm.q"].dense().detach().double()
    assert gap(change, audio.dense() + image.dense()) < 1e-6
    for path in ("audio.proj", "image.proj"):
        torch.testing.assert_close(apart.deltas[path].dense(), merged.deltas[path].dense())


def test_an_input_that_changes_nothing_owns_nothing() -> None:
    low = lows(1)[0]
    zeros = LowRank(torch.zeros(OUT, 1).double(), torch.zeros(1, IN).double())
    for space in ("factors", "delta"):
        assert gap(run("damc", space, [low, zeros], [0.5, 0.5]), low.dense()) < 1e-12


# -- densities by input ---------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["aligned", "delta"])
@pytest.mark.parametrize("name", ["ties", "dare", "dare-ties"])
def test_inputs_may_have_densities_of_their_own(name: str, space: str) -> None:
    given, shares = lows(K), [0.3, 1.0, 0.6]
    same = run(name, space, given, density=[0.5] * K)
    torch.testing.assert_close(dense(same), dense(run(name, space, given, density=0.5)))
    if space == "delta":
        taus = [low.dense() for low in given]
        if name == "ties":
            cut = [ties_by_hand([t], d) for t, d in zip(taus, shares, strict=True)]
            wanted = elected(cut)
        else:
            cut = [dropped(taus, d)[i] for i, d in enumerate(shares)]
            wanted = sum(cut) / K if name == "dare" else elected(cut)
        assert gap(run(name, space, given, MEAN, density=shares), wanted) < 1e-6
    with pytest.raises(PlaitError, match="densities for 3 inputs"):
        run(name, space, given, density=[0.5, 0.5])


def test_dare_in_factors_drops_each_input_by_its_own_density() -> None:
    given = lows(2)
    found = run("dare", "factors", given, [0.5, 0.5], density=[1.0, 0.4])
    assert isinstance(found, LowRank)
    apart = run("dare", "factors", given, [0.0, 1.0], density=0.4)
    assert gap(found, 0.5 * given[0].dense() + 0.5 * dense(apart)) < 1e-9


def test_dare_ties_may_add_up_what_agrees() -> None:
    taus = [low.dense() for low in lows(K)]
    stack = torch.stack(dropped(taus, 0.5)) / K
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    wanted = (stack * (stack * sign > 0)).sum(0)
    found = run("dare-ties", "delta", lows(K), MEAN, density=0.5, reduce="sum")
    assert gap(found, wanted) < 1e-6
