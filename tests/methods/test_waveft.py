"""WaveFT: the wavelets' own laws, the synthesis written out, and the product that does without."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait import kernels
from plait.methods import _wavelet

NAMES = ("db1", "db2", "db3", "db10")
SHAPES = [(12, 8), (8, 12), (7, 9), (9, 8)]  # (in, out)


def linear(inputs, outputs, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    options = {"coefficients": 12, "scaling": 2.0, **options}
    adapter = plait.attach(model, "waveft", seed=2, **options)
    tiny.scramble(adapter, 0.5)
    return model, adapter.deltas["0"]


def matrix(name, size):
    """R [size, 2 h], entry by entry."""
    lo, hi = _wavelet.filters(name)
    wide = _wavelet.padded(size, name)
    R = torch.zeros(size, wide, dtype=torch.float64)
    for i in range(size):
        for a in range(wide // 2):
            tap = i + len(lo) - 2 - 2 * a
            if 0 <= tap < len(lo):
                R[i, a], R[i, wide // 2 + a] = lo[tap], hi[tap]
    return R


def written_out(delta, name):
    rows, columns = delta.site.shape
    R, C = matrix(name, rows), matrix(name, columns)
    spectrum = torch.zeros(R.shape[1] * C.shape[1], dtype=torch.float64)
    spectrum = spectrum.index_add(0, delta.places, delta.spectrum)
    return 2.0 * R @ spectrum.view(R.shape[1], C.shape[1]) @ C.t()


@pytest.mark.parametrize("name", _wavelet.WAVELETS)
def test_filters_are_orthonormal_with_vanishing_moments(name):
    lo, hi = (torch.tensor(f, dtype=torch.float64) for f in _wavelet.filters(name))
    moments = int(name[2:])
    assert len(lo) == 2 * moments and float(lo.sum()) == pytest.approx(math.sqrt(2))
    for shift in range(0, len(lo), 2):
        one = float(shift == 0)
        for a, b, want in ((lo, lo, one), (hi, hi, one), (lo, hi, 0.0)):
            assert float(a[shift:] @ b[: len(b) - shift]) == pytest.approx(want, abs=1e-8)
    place = torch.arange(len(hi), dtype=torch.float64) / len(hi)
    for power in range(moments):
        assert float(hi @ place**power) == pytest.approx(0.0, abs=1e-6)


def test_filters_that_have_a_closed_form():
    root = math.sqrt(3)
    want = [(1 + root), (3 + root), (3 - root), (1 - root)]
    assert _wavelet.filters("db2")[0] == pytest.approx([w / (4 * math.sqrt(2)) for w in want])
    assert _wavelet.filters("db1") == (
        pytest.approx([2**-0.5] * 2),
        pytest.approx([2**-0.5, -(2**-0.5)]),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 7, 8, 30])
def test_synthesis_and_analysis_are_the_matrix_and_its_transpose(name, size):
    R = matrix(name, size)
    s = torch.randn(R.shape[1], 3, dtype=torch.float64)
    x = torch.randn(size, 3, dtype=torch.float64)
    torch.testing.assert_close(_wavelet.synthesis(s, name, size), R @ s)
    torch.testing.assert_close(_wavelet.analysis(x, name), R.t() @ x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_synthesis_written_out(shape, name):
    model, delta = linear(*shape, wavelet=name)
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, shape[1], dtype=torch.float64)
    dW = written_out(delta, name)
    torch.testing.assert_close(delta.dense(), dW)
    want = F.linear(x, model[0].weight + dW, model[0].bias)
    got = model(x)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, [x, delta.spectrum], g)
    for a, b in zip(torch.autograd.grad(got, [x, delta.spectrum], g), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), want)


def test_a_haar_coefficient_moves_a_patch_of_two_by_two():
    _, delta = linear(8, 6, coefficients=1)
    dW = delta.dense().detach()
    assert (dW != 0).sum() == 4
    torch.testing.assert_close(dW[dW != 0].abs(), delta.spectrum.detach().abs().expand(4))
    i, j = (dW != 0).nonzero()[0].tolist()
    assert i % 2 == 0 and j % 2 == 0


def test_without_a_transform_coefficients_are_entries():
    model, delta = linear(9, 6, wavelet=None)
    want = torch.zeros(54, dtype=torch.float64)
    want[delta.places] = 2.0 * delta.spectrum.detach()
    torch.testing.assert_close(delta.dense(), want.view(6, 9))
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(
        model(x), F.linear(x, model[0].weight + want.view(6, 9), model[0].bias)
    )


def test_coefficients_do_not_share_a_place():
    for name in NAMES:
        _, delta = linear(9, 6, wavelet=name, coefficients=54)
        assert len(delta.places.unique()) == 54


def test_backward_keeps_x_and_the_coefficients_alone():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 40))
    delta = plait.attach(model, "waveft", coefficients=25).deltas["0"]
    kept = []
    x = torch.randn(6, 30)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta(x)
    assert all(t.data_ptr() == x.data_ptr() or t.numel() <= 25 for t in kept)


def test_unknown_wavelets_are_refused():
    with pytest.raises(plait.PlaitError, match="no wavelet 'db11'"):
        linear(9, 6, wavelet="db11")


def test_start_counts_and_training():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "waveft", coefficients=60)
    assert torch.equal(tiny.logits(model), before)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == 60 * 14
    losses = tiny.losses(model, adapter, lr=1e-2)
    assert losses[-1] < 0.9 * losses[0]
