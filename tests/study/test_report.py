"""The report: one file that opens anywhere, says what was found, and shows it."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from plait.study.advice import advise
from plait.study.contender import Contender
from plait.study.inference import Interval
from plait.study.plots import front
from plait.study.report import write_report
from plait.study.results import Comparison, make_rows, verdict_of
from plait.study.store import finite

CHROMIUM = shutil.which("chromium")


def comparison(effects: dict[str, float], seeds: int = 3, **changes: object) -> Comparison:
    """Synthetic records of methods whose true accuracy differs by `effects`."""
    draw = np.random.default_rng(0)
    easy = draw.uniform(size=150)
    tuned, finals = {}, {}
    for number, (label, effect) in enumerate(effects.items()):
        tuned[label] = [
            {
                "lr": lr,
                "loss": (np.log10(lr) + 2) ** 2 - effect + 0.1 * number,
                "state": "done",
                "rungs": {"10": 3.0},
                "label": label,
            }
            for lr in (1e-3, 1e-2, 1e-1)
        ]
        finals[label] = [
            {
                "seed": seed,
                "scores": (easy + draw.normal(0, 0.05, 150) < 0.5 + effect).astype(float).tolist(),
                "loss": 0.5 - effect,
                "losses": np.linspace(2, 0.5, 40).tolist(),
                "seconds": (np.arange(1, 41) * 0.1 * (number + 1)).tolist(),
                "start_seconds": 0.2,
                "step_seconds": 0.1 * (number + 1),
                "parameters": 1000 * (number + 1),
                "bytes": 4000 * (number + 1),
                "peak_memory": 10**9,
            }
            for seed in range(1, seeds + 1)
        ]
    found = Comparison(
        task={
            "name": "t<>",
            "title": "",
            "metric": "accuracy",
            "higher_is_better": True,
            "test_examples": 150,
        },
        rows=make_rows([Contender(n, "lora") for n in effects], tuned, finals, {}, {}),
        base_score=0.3,
        verdict=verdict_of(finals, True),
        planned={
            "steps": dict.fromkeys(effects, 40),
            "trials": 3,
            "seeds": seeds,
            "note": "",
            "finalists": 2,
            "tune_seconds": 60.0,
            "final_seconds": 50.0,
            "budget": 120.0,
        },
        spent={
            "seconds": 115.0,
            "rounds of tuning": 3,
            "pruned": 0,
            "diverged": 0,
            "seeds": seeds,
            "steps trained": 700,
            "workers": 1,
        },
        settings={"recipe": "base: x"},
    )
    found.advice = advise(found)
    return found


def test_advice_names_a_winner_only_where_there_is_one() -> None:
    clear = comparison({"lora": 0.0, "dora": 0.3})
    assert clear.winner == "dora" and clear.advice.startswith("Take dora: its accuracy is better")
    alike = comparison({"lora": 0.0, "dora": 0.0, "hra": 0.0})
    assert alike.winner is None
    assert "within noise: no winner. Take the cheapest, lora" in alike.advice


def test_the_cheapest_is_chosen_among_the_best_only() -> None:
    found = comparison({"lora": -0.3, "dora": 0.1, "hra": 0.1})
    assert found.winner is None and found.verdict is not None
    assert set(found.verdict.tied) == {"dora", "hra"}
    assert "dora and hra lie within noise" in found.advice.replace("between ", "")
    assert "Take the cheapest, dora" in found.advice and found.gap("lora") == "worse"


def test_what_looks_worse_is_not_advised_for_being_cheap() -> None:
    found = comparison({"lora": 0.0, "dora": 0.1, "hra": 0.1})
    assert found.verdict is not None and found.verdict.leader == "dora"
    verdict = found.verdict
    unsure = [
        dataclasses.replace(
            d, adjusted=0.2, interval=Interval(0.1, 0.02 if d.b == "lora" else -0.1, 0.2)
        )
        for d in verdict.differences
    ]
    found.verdict = dataclasses.replace(
        verdict, winner=None, tied=["dora", "hra", "lora"], differences=unsure
    )
    advice = advise(found)
    assert "all methods lie within noise: no winner. lora looks worse all the same" in advice
    assert "Take the cheapest, dora" in advice
    found.verdict.differences[:] = [
        dataclasses.replace(d, interval=Interval(0.1, 0.02, 0.2)) for d in unsure
    ]
    assert "lora and hra look worse" in advise(found) and "Take dora, which leads." in advise(found)


def test_one_seed_is_not_enough_for_advice() -> None:
    found = comparison({"lora": 0.0, "dora": 0.3}, seeds=1)
    assert found.winner is None and "one seed" in found.advice and found.gap("lora") == "undecided"


def test_seeds_that_not_all_have_are_left_out() -> None:
    records = {
        n: [{"seed": s, "scores": [float(s)] * 9} for s in seeds]
        for n, seeds in {"a": (1, 2, 3), "b": (1, 2)}.items()
    }
    verdict = verdict_of(records, True)
    assert verdict is not None and verdict.means == {"a": 1.5, "b": 1.5}


def test_the_front_is_what_nothing_beats() -> None:
    draw = np.random.default_rng(1)
    points = [(float(c), float(s)) for c, s in draw.uniform(size=(40, 2))]
    kept = front(points, higher_is_better=True)
    beaten = {
        i
        for i, (c, s) in enumerate(points)
        if any(d <= c and t >= s and (d, t) != (c, s) for d, t in points)
    }
    assert set(kept) == set(range(40)) - beaten
    low = front([(c, -s) for c, s in points], higher_is_better=False)
    assert low == kept


def test_the_report_is_one_safe_file(tmp_path: Path, pictures: None) -> None:
    found = comparison({"lora": 0.0, "<script>x</script>": 0.2})
    text = write_report(tmp_path / "report.html", found).read_text()
    assert "<script" not in text and "t&lt;&gt;" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text) and text.count("<img") == 4
    assert html.escape(found.advice[:20]) in text
    json.dumps(finite(found.as_dict()), allow_nan=False)


def test_without_matplotlib_the_tables_stand(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = write_report(tmp_path / "r.html", comparison({"lora": 0.0, "dora": 0.1})).read_text()
    assert "<img" not in text and "plait[plots]" in text and "dora" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_report_shows_in_a_browser(tmp_path: Path, pictures: None) -> None:
    """Drawn by a real browser: of the wanted size, and not blank in any third of the page."""
    found = comparison({"lora": 0.0, "dora": 0.05, "hra": 0.1})
    page = write_report(tmp_path / "report.html", found)
    shot = screenshot(page, tmp_path / "shot.png", 1100, 3200)
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (1100, 3200)
    from matplotlib.image import imread

    grey = imread(shot)[..., :3].mean(-1)
    thirds = np.array_split(grey, 3)
    assert all((part < 0.5).mean() > 0.005 for part in thirds[:2])
    assert (np.abs(imread(shot)[..., 0] - imread(shot)[..., 2]) > 0.3).sum() > 500  # coloured plots


def screenshot(page: Path, file: Path, width: int, height: int) -> Path:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},{height}", f"--screenshot={file}"]
    command += [f"--user-data-dir={file.parent / 'profile'}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return file
