"""The reference quantiser: its code books, nearest codes, blocks, and what it spends."""

from __future__ import annotations

import pytest
import torch

import plait
from plait.quantization import (
    BlockQuantizer,
    Quantizer,
    dynamic_codes,
    normal_codes,
    uniform_codes,
)

NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0
"""
"""The table that the QLoRA paper prints in its appendix."""


def test_normal_codes_are_the_paper_s_nf4() -> None:
    want = torch.tensor([float(x) for x in NF4.split()], dtype=torch.float64)
    got = torch.tensor(normal_codes(4), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("make", [normal_codes, uniform_codes])
def test_code_books_ascend_from_minus_one_to_one(make, width: int) -> None:
    codes = make(width)
    assert len(set(codes)) == 2**width and list(codes) == sorted(codes)
    assert codes[0] == -1 and codes[-1] == 1 and (make is uniform_codes or 0.0 in codes)


@pytest.mark.parametrize("codes", ["normal", "uniform"])
@pytest.mark.parametrize(("width", "block"), [(2, 16), (4, 64), (3, 7)])
def test_every_weight_goes_to_the_nearest_code_of_its_block(codes, width, block) -> None:
    quantizer = BlockQuantizer(width, block, codes)
    W = torch.randn(6, 15, dtype=torch.float64)
    book = torch.tensor((normal_codes if codes == "normal" else uniform_codes)(width)).double()
    want = []
    for chunk in W.flatten().split(block):
        scale = chunk.abs().max()
        distances = (chunk[:, None] - scale * book[None]).abs()
        want.append(scale * book[distances.argmin(1)])
    torch.testing.assert_close(
        quantizer.quantize(W), torch.cat(want).reshape(6, 15), atol=1e-7, rtol=0
    )


def test_what_was_quantised_is_a_fixed_point() -> None:
    quantizer = BlockQuantizer(width=3, block=8)
    once = quantizer.quantize(torch.randn(5, 8))
    torch.testing.assert_close(quantizer.quantize(once), once)


def test_shape_dtype_and_zeros_stay() -> None:
    quantizer = BlockQuantizer()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        W = torch.randn(3, 4, 50).to(dtype)
        back = quantizer.quantize(W)
        assert back.shape == W.shape and back.dtype == dtype
        assert not quantizer.quantize(torch.zeros_like(W)).any()


def test_normal_codes_lose_less_on_normal_weights() -> None:
    W = torch.randn(64, 256)
    errors = {c: (W - BlockQuantizer(codes=c).quantize(W)).norm() for c in ("normal", "uniform")}
    assert errors["normal"] < errors["uniform"]


def test_bits_count_the_scales() -> None:
    assert BlockQuantizer(4, 64).bits == 4.5 and BlockQuantizer(2, 32).bits == 3.0
    assert isinstance(BlockQuantizer(), Quantizer)


@pytest.mark.parametrize("wrong", [{"width": 1}, {"width": 9}, {"block": 0}, {"codes": "nf"}])
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(plait.PlaitError):
        BlockQuantizer(**wrong)


def test_dynamic_codes_halve_from_decade_to_decade() -> None:
    for signed, most in ((True, 64), (False, 128)):
        codes = dynamic_codes(signed)
        assert len(set(codes)) == 256 and list(codes) == sorted(codes)
        assert 0.0 in codes and codes[-1] == 1.0 and (codes[0] < 0) is signed
        for decade in range(7):
            inside = [c for c in codes if 10.0 ** -(decade + 1) < c < 10.0**-decade]
            assert len(inside) == most // 2**decade
            steps = torch.tensor(inside, dtype=torch.float64).diff()
            torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    negative = [-c for c in dynamic_codes() if c < 0]
    assert sorted(negative) == [c for c in dynamic_codes() if 0 < c < 1]


def test_dynamic_codes_keep_what_equal_steps_lose() -> None:
    values = 10.0 ** -torch.linspace(0, 6, 256, dtype=torch.float64)
    relative = lambda codes: ((BlockQuantizer(8, 256, codes).quantize(values) / values) - 1).abs()  # noqa: E731
    assert relative("dynamic-unsigned").max() < 0.5
    assert relative("dynamic-unsigned")[values > 0.01].max() < 0.06
    assert (relative("uniform")[values < 1e-3] > 0.9).any()


@pytest.mark.parametrize("codes", ["normal", "uniform", "dynamic"])
def test_codes_and_scales_are_what_quantize_reads_back(codes: str) -> None:
    quantizer, W = BlockQuantizer(8, 100, codes), torch.randn(13, 17)
    stored, scale = quantizer.encode(W)
    assert stored.dtype == torch.uint8 and stored.shape == W.shape and len(scale) == 3
    assert torch.equal(quantizer.decode(stored, scale), quantizer.quantize(W))


def test_dynamic_codes_have_one_width() -> None:
    with pytest.raises(plait.PlaitError, match="width 8"):
        BlockQuantizer(4, 64, "dynamic")
