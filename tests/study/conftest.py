"""Bake-offs in tests draw no pictures, which take longer than their trials; test_report's do."""

from __future__ import annotations

import pytest

from plait.study import report


@pytest.fixture
def pictures() -> None:
    """Asked for by tests that want the plots."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(report, "_picture", lambda *_: [])
