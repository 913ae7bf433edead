"""The page as a browser shows it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from damaged import deep_model, lora
from plait.evaluation import IntruderSearch, inspect_adapters, write_inspection

CHROMIUM = next((p for n in ("chromium", "chromium-browser") if (p := shutil.which(n))), None)


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    from matplotlib.image import imread

    model = deep_model()
    adapters = [lora(model, name, seed) for seed, name in enumerate(("one", "two"))]
    found = inspect_adapters(adapters, model, entropy=True, intruders=IntruderSearch())
    html = write_inspection(found, tmp_path / "out")[0]
    shot, profile = tmp_path / "shot.png", f"--user-data-dir={tmp_path / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile]
    size = "--window-size=1200,3000"
    words = [CHROMIUM, *flags, size, f"--screenshot={shot}", html.as_uri()]
    done = subprocess.run(words, capture_output=True, timeout=120, check=False)
    if not shot.is_file():
        pytest.skip(f"chromium does not run here: {done.stderr[-200:]!r}")
    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    inked = (pixels.min(-1) < 0.97).any(1)
    assert inked[:2500].mean() > 0.5  # text and pictures all the way down, no blank page
    # The maps' colours are there (viridis' dark blue, RdBu's red), so the pictures have loaded.
    dark = ((pixels - [0.267, 0.005, 0.329]) ** 2).sum(-1) < 0.02
    assert dark.sum() > 500
    right = pixels[:, 1180:].min()
    assert right > 0.97, "something sticks out of the page"
