"""Merges that read the base's weights: from a model, from files, or where adapters are attached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import plait
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging import Merge, MergeMethod, merge
from plait.merging.changes import Changes


@dataclass
class Rising(Merge):
    """The sum of the changes where the base is positive, which only the base can tell."""

    spaces = ("delta",)
    reads_base = True

    def combine(self, block: Tensor, rows: range, weights, changes: Changes, found) -> Tensor:
        return (weights * block).sum(0) * (changes.base_weight(rows) > 0)


RISING = MergeMethod("rising", "", "", Rising)
KINDS = ["linear", "turned", "words", "image"]


class Model(nn.Module):
    """One site of each layout, with biases where the kind has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.turned = Conv1D(5, 6)
        self.words = nn.Embedding(7, 4)
        self.image = nn.Conv2d(2, 3, 2)


@pytest.fixture
def model() -> nn.Module:
    made = Model()
    for name in ("one", "two"):
        adapter = plait.attach(made, "lora", rank=2, name=name, targets=KINDS, bias=name == "one")
        for p in adapter.parameters():
            nn.init.normal_(p)
    return made


def expected(model: nn.Module) -> dict[str, Tensor]:
    """Float64, straight from each layer's stored tensor."""
    stored = {name: model.get_submodule(name).weight.detach().double() for name in KINDS}
    W = {**stored, "turned": stored["turned"].T, "words": stored["words"].T}
    W["image"] = stored["image"].flatten(1)
    both = [plait.adapters(model)[n] for n in ("one", "two")]
    return {
        n: sum(w * a.deltas[n].dense().double() for w, a in zip((0.7, -0.3), both, strict=True))
        * (W[n] > 0)
        for n in KINDS
    }


def folder(model: nn.Module, tmp_path: Path) -> Path:
    own = {k: v.contiguous() for k, v in model.state_dict().items() if "plait" not in k}
    save_file(own, tmp_path / "model.safetensors")
    return tmp_path


def loose(model: nn.Module, tmp_path: Path) -> list[Path]:
    return [plait.adapters(model)[n].save(tmp_path / n) for n in ("one", "two")]


@pytest.mark.parametrize("where", ["attached", "model", "folder", "file"])
def test_the_base_is_read_wherever_it_is(model: nn.Module, tmp_path: Path, where: str) -> None:
    wanted = expected(model)
    (tmp_path / "base").mkdir()
    base = folder(model, tmp_path / "base")
    given = {"attached": None, "model": model, "folder": base, "file": base / "model.safetensors"}
    inputs = loose(model, tmp_path)
    if where == "attached":
        inputs = [plait.adapters(model)[n] for n in ("one", "two")]
    found = merge(inputs, RISING, [0.7, -0.3], base=given[where], rank=5)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found.deltas[name].dense().double(), tensor, atol=1e-5, rtol=0)
    bias = 0.7 * plait.adapters(model)["one"].deltas["linear"].bias() * (model.linear.bias > 0)
    torch.testing.assert_close(found.deltas["linear"].bias(), bias.detach())


def test_what_an_active_adapter_wrote_into_the_base_is_not_seen() -> None:
    model = Model()
    stored = model.linear.weight.detach().clone()
    one = plait.attach(model, "lora", rank=2, name="one", targets=["linear"])
    nn.init.normal_(one.deltas["linear"].B)
    edit = plait.attach(model, "paca", rank=3, name="edit", targets=["linear"])
    for p in edit.parameters():
        nn.init.constant_(p, 9.0)
    plait.activate(model, {})
    plait.activate(model, "edit")
    assert not torch.equal(model.linear.weight > 0, stored > 0)
    found = merge([one], RISING, [1.0], rank=5)
    dense = one.deltas["linear"].dense() * (stored > 0)
    torch.testing.assert_close(found.deltas["linear"].dense(), dense, atol=1e-5, rtol=0)
    assert not torch.equal(model.linear.weight > 0, stored > 0), "the edit is put back"


def test_a_missing_or_wrong_base_is_named(model: nn.Module, tmp_path: Path) -> None:
    inputs = loose(model, tmp_path)
    with pytest.raises(PlaitError, match=r"'rising' reads the base's weight at 'linear'; pass"):
        merge(inputs, RISING)
    with pytest.raises(PlaitError, match="has no module 'linear'"):
        merge(inputs, RISING, base=nn.Sequential())
    save_file({"linear.bias": torch.ones(5)}, tmp_path / "some.safetensors")
    with pytest.raises(PlaitError, match=r"has no tensor 'linear.weight'"):
        merge(inputs, RISING, base=tmp_path / "some.safetensors")
    other = Model()
    other.linear = nn.Linear(6, 9)
    with pytest.raises(PlaitError, match=r"'linear' is \[9, 6\], but the adapters change \[5, 6\]"):
        merge(inputs, RISING, base=other)
    with pytest.raises(PlaitError, match="fused"):
        plait.fuse(model)
        merge(inputs, RISING, base=model)
    with pytest.raises(PlaitError, match="reads the base's weight, which is not known"):
        Changes("s", [LowRank(torch.ones(2, 1), torch.ones(1, 2))]).base_weight()
