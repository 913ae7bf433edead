"""pack: what is written is what is read, bit for bit, as small and as near as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import plait
from plait.adapter.formats.coded import pack_bits, unpack_bits
from plait.errors import FormatError, PlaitError
from plait.quantization import SignQuantizer
from tiny_language_model import tiny_model


def trained(**options: object) -> plait.Adapter:
    adapter = plait.attach(tiny_model(), "lora", name="a", **{"rank": 4} | options)
    draw = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return adapter


def gap(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.detach().double(), other.detach().double()
    return float((exact - other).norm() / exact.norm())


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 61])
def test_codes_of_any_width_take_their_bits_and_come_back(width: int, count: int) -> None:
    codes = torch.randint(0, 2**width, (count,), dtype=torch.uint8)
    packed = pack_bits(codes, width)
    assert len(packed) == -(-count * width // 8)
    assert torch.equal(unpack_bits(packed, width, count), codes)
    as_text = "".join(f"{int(c):0{width}b}" for c in codes)
    assert "".join(f"{int(b):08b}" for b in packed).startswith(as_text)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_file_reads_back_as_what_was_reported(bits: int, tmp_path: Path) -> None:
    adapter = trained(bias=True)
    packed = plait.pack(adapter, tmp_path / "packed", bits)
    again = plait.read_adapter(tmp_path / "packed")
    for path, delta in again.deltas.items():
        for leaf in ("A", "B"):
            mine, kept = getattr(delta, leaf), getattr(packed.adapter.deltas[path], leaf)
            assert torch.equal(mine, kept)
            for component in mine if leaf == "A" else mine.mT:
                assert len(component.unique()) <= 2**bits * len(component) / 8
        exact = adapter.deltas[path].dense()
        assert packed.errors[path] == pytest.approx(gap(exact, delta.dense()), rel=1e-3, abs=1e-6)
        torch.testing.assert_close(delta.bias(), adapter.deltas[path].bias())
    assert packed.nbytes == sum(f.stat().st_size for f in (tmp_path / "packed").iterdir())


def test_one_bit_is_one_scale_a_component_and_two_values() -> None:
    weight = torch.randn(3, 50)
    codes, scales = SignQuantizer(50).encode(weight)
    torch.testing.assert_close(scales, weight.abs().mean(1))
    assert torch.equal(codes.bool(), weight >= 0)
    back = SignQuantizer(50).quantize(weight)
    for row, value in zip(back, weight, strict=True):
        assert len(row.abs().unique()) == 1
        for other in (0.9, 1.1):  # the mean is the best scale there is
            assert (row - value).norm() < (other * row - value).norm()
    short = SignQuantizer(7).quantize(weight.flatten()[:17])  # a last block of 3
    torch.testing.assert_close(short[14:].abs(), weight.flatten()[14:17].abs().mean().expand(3))


def test_more_bits_are_nearer_and_turns_nearer_still(tmp_path: Path) -> None:
    adapter = trained()
    means = []
    for bits in (1, 2, 3, 4, 6, 8):
        errors = plait.pack(adapter, tmp_path / f"{bits}", bits).errors
        alone = plait.pack(adapter, tmp_path / f"{bits}-alone", bits, rounds=0).errors
        assert all(errors[p] <= alone[p] * (1 + 1e-6) for p in errors)
        means.append(sum(errors.values()) / len(errors))
        if bits == 1:
            assert means[0] < 0.96 * sum(alone.values()) / len(alone)
    assert means == sorted(means, reverse=True) and means[-1] < 0.01


def test_one_bit_files_are_a_fraction_of_the_plain_ones(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024))
    adapter = plait.attach(model, "lora", rank=32, targets=["0"], name="a")
    adapter.deltas["0"].B.data.normal_()
    adapter.save(tmp_path / "plain")
    plait.pack(adapter, tmp_path / "packed", 1)
    sizes = [(tmp_path / n / "adapter.safetensors").stat().st_size for n in ("plain", "packed")]
    assert sizes[1] < 64 * 1024 / 8 + 64 * 2 + 1000 < sizes[0] / 25


def test_adapters_that_do_nothing_or_hold_huge_numbers(tmp_path: Path) -> None:
    adapter = trained(targets=["q_proj"])
    zero, huge = adapter.deltas.values()
    zero.B.data.zero_()
    huge.B.data *= 1e12
    plait.pack(adapter, tmp_path / "packed", 8)
    again = plait.read_adapter(tmp_path / "packed")
    assert zero.site.path not in again.deltas
    assert gap(huge.dense(), again.deltas[huge.site.path].dense()) < 0.01


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    plait.pack(trained(), tmp_path / "packed", 4)
    file = tmp_path / "packed" / "plait.json"
    text = json.loads(file.read_text())
    assert text["version"] == 2
    for key, value, match in (
        ("width", 5, "are not those"),
        ("width", 99, "width 99"),
        ("block", 0, "block 0"),
        ("book", [0.0], "book of 1"),
        ("tensors", {"x.A": [2, 2]}, "missing"),
    ):
        broken = {**text, "coded": [{**text["coded"][0], key: value}, *text["coded"][1:]]}
        file.write_text(json.dumps(broken))
        with pytest.raises(FormatError, match=match):
            plait.read_adapter(tmp_path / "packed")
    with pytest.raises(PlaitError, match="bits is 1 to 8"):
        plait.pack(trained(), tmp_path / "none", 9)
