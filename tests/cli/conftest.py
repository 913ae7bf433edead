"""A tiny base on disk, and two adapters for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import plait
from plait.cli.main import main
from tiny_language_model import save_tiny_base, tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`sql` (rank 4, all linears) and `chat` (rank 2, attention), trained-looking."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    wanted = {"sql": (4, "all-linear"), "chat": (2, ["q_proj", "v_proj"])}
    for seed, (name, (rank, targets)) in enumerate(wanted.items()):
        adapter = plait.attach(model, "lora", name=name, rank=rank, targets=targets)
        draw = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
        adapter.save(folder / name)
    return {name: folder / name for name in wanted}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(5)]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `plait` in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
