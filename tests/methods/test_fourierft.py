"""FourierFT: the inverse transform written out, and the product that does without it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait import kernels

SHAPES = [(12, 8), (8, 12), (7, 9), (9, 8), (2, 3), (1, 4)]  # (in, out): even, odd, tiny


def linear(inputs, outputs, count=10, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    count = min(count, inputs * outputs)
    adapter = plait.attach(model, "fourierft", coefficients=count, scaling=20.0, seed=2, **options)
    return model, adapter.deltas["0"]


def written_out(delta):
    """scaling * Re(ifft2(F)), every entry as a sum of cosines."""
    rows, columns = delta.site.shape
    u = torch.arange(rows, dtype=torch.float64)[:, None]
    v = torch.arange(columns, dtype=torch.float64)
    total = torch.zeros(rows, columns, dtype=torch.float64)
    for place, c in zip(delta.places.tolist(), delta.spectrum, strict=True):
        j, l = divmod(place, columns)
        total = total + c * torch.cos(2 * math.pi * (j * u / rows + l * v / columns))
    return 20.0 * total / (rows * columns)


@pytest.mark.parametrize("count", [1, 10, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_cosines_written_out(shape, count):
    model, delta = linear(*shape, count)
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, shape[1], dtype=torch.float64)
    dW = written_out(delta)
    torch.testing.assert_close(delta.dense(), dW)
    want = F.linear(x, model[0].weight + dW, model[0].bias)
    got = model(x)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, [x, delta.spectrum], g)
    for a, b in zip(torch.autograd.grad(got, [x, delta.spectrum], g), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), want)


def test_the_dense_form_is_the_inverse_transform():
    _, delta = linear(12, 8)
    spectrum = torch.zeros(8 * 12, dtype=torch.float64)
    spectrum[delta.places] = delta.spectrum.detach()
    want = torch.fft.ifft2(spectrum.view(8, 12)).real * 20.0
    torch.testing.assert_close(delta.dense(), want)


def test_sites_of_one_shape_have_the_same_places_from_the_option_alone():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 6))
    adapter = plait.attach(model, "fourierft", coefficients=20, seed=1)
    first, second, other = (d.places for d in adapter.deltas.values())
    assert torch.equal(first, second) and len(first.unique()) == 20 and int(other.max()) < 72
    again = plait.attach(nn.Sequential(nn.Linear(12, 12)), "fourierft", coefficients=20, seed=9)
    assert torch.equal(again.deltas["0"].places, first)
    moved = plait.attach(
        nn.Sequential(nn.Linear(12, 12)), "fourierft", coefficients=20, location_seed=1
    )
    assert not torch.equal(moved.deltas["0"].places, first)
    assert set(adapter.state_dict()) == {"0.spectrum", "1.spectrum", "2.spectrum"}


def test_backward_keeps_x_and_the_coefficients_alone():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 40))
    delta = plait.attach(model, "fourierft", coefficients=25).deltas["0"]
    kept = []
    x = torch.randn(6, 30)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta(x)
    assert all(t.data_ptr() == x.data_ptr() or t.numel() <= 25 for t in kept)


def test_more_coefficients_than_entries_are_refused():
    with pytest.raises(plait.PlaitError, match="72 coefficients"):
        plait.attach(nn.Sequential(nn.Linear(12, 6)), "fourierft", coefficients=73)


def test_starts_counts_and_training():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "fourierft", coefficients=60, start="zeros", scaling=300.0)
    assert torch.equal(tiny.logits(model), before)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == 60 * 14
    losses = tiny.losses(model, adapter, lr=0.1)
    assert losses[-1] < 0.9 * losses[0]
    model = tiny.llama()
    adapter = plait.attach(model, "fourierft", coefficients=60)
    assert not torch.equal(tiny.logits(model), before)
    c = torch.cat([d.spectrum for d in adapter.deltas.values()])
    assert abs(float(c.detach().std()) - 1) < 0.1
