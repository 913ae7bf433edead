"""The MPS adapter against an einsum over its chain, and the entropy its bonds allow."""

import math

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from plait.linalg.entanglement import entropy_profile
from plait.methods._modes import split_side
from tiny import llama as tiny_llama
from tiny import losses, scramble

FORMS = [{"rank": 3, "modes": 2}, {"rank": 2, "modes": 3}, {"rank": 5, "modes": 1}]


def make(rows=18, columns=24, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    adapter = plait.attach(model, "mps-adapter", seed=2, **options)
    return model, adapter.deltas["0"], adapter


def oracle(delta):
    """The chain contracted from the left into one tensor."""
    state = delta.cores()[0]
    for core in delta.cores()[1:]:
        state = torch.tensordot(state, core, 1)
    return delta.options.scaling * state.reshape(delta.site.shape)


@pytest.mark.parametrize("options", FORMS)
def test_output_and_gradients_equal_those_of_the_chain(options):
    model, delta, adapter = make(**options)
    scramble(adapter, 0.5)
    torch.testing.assert_close(delta.dense(), oracle(delta))
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    G = torch.randn(2, 5, 18, dtype=torch.float64)
    wanted = delta.site.forward(x) + x @ oracle(delta).t()
    torch.testing.assert_close(model(x), wanted)
    inputs = [*adapter.parameters(), x]
    got = torch.autograd.grad((model(x) * G).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((wanted * G).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", FORMS)
def test_start_is_the_base_in_bits(options):
    for sigma in (None, 0.5):
        model, delta, _ = make(sigma=sigma, **options)
        x = torch.randn(5, 24, dtype=torch.float64)
        assert torch.equal(model(x), delta.site.forward(x))


def test_cores_start_left_canonical():
    _, delta, _ = make(rank=3, modes=2)
    for core in delta.cores()[:-1]:
        unfolded = core.flatten(0, 1)
        torch.testing.assert_close(
            unfolded.t() @ unfolded,
            torch.eye(core.shape[2], dtype=torch.float64),
            atol=1e-6,
            rtol=0,
        )
    B = delta.factors().B
    torch.testing.assert_close(B.t() @ B, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_one_core_a_side_is_lora():
    _, delta, adapter = make(rank=5, modes=1)
    scramble(adapter, 0.5)
    first, last = delta.cores()
    torch.testing.assert_close(delta.dense(), 2.0 * first[0] @ last[..., 0])
    assert adapter.num_parameters() == 5 * (18 + 24)


@pytest.mark.parametrize("options", FORMS)
def test_entropy_is_bounded_by_the_bonds(options):
    _, delta, adapter = make(**options)
    scramble(adapter, 0.5)
    modes = [split_side(size, options["modes"]) for size in (18, 24)]
    profile = entropy_profile(delta.dense().detach(), *modes)
    bonds = [shape[2] for shape in delta.options.shapes(delta.site)][:-1]
    assert len(profile) == len(bonds)
    for S, bond in zip(profile, bonds, strict=True):
        assert float(S) <= math.log(bond) + 1e-9
    torch.testing.assert_close(entropy_profile(delta.factors(), *modes), profile)


def test_bonds_are_no_wider_than_what_they_join():
    _, delta, adapter = make(rank=1000, modes=2)
    assert [c.shape[2] for c in delta.cores()] == [6, 18, 4, 1]
    scramble(adapter, 0.5)
    assert torch.linalg.matrix_rank(delta.dense()) == 18


def test_count_by_formula():
    _, delta, adapter = make(rank=3, modes=2)
    wanted = 1 * 6 * 3 + 3 * 3 * 3 + 3 * 6 * 3 + 3 * 4 * 1
    assert adapter.num_parameters() == wanted
    assert adapter.method.count([delta.site], delta.options) == wanted


def test_the_export_is_exact_and_of_rank_chi():
    _, delta, adapter = make(rank=3, modes=2)
    scramble(adapter, 0.5)
    lora = adapter.to_lora().deltas["0"]
    assert lora.rank == 3
    torch.testing.assert_close(lora.dense(), oracle(delta))


def test_training():
    model = tiny_llama()
    adapter = plait.attach(model, "mps-adapter", rank=8, modes=2, seed=0)
    found = losses(model, adapter, lr=2e-2)
    assert found[-1] < 0.7 * found[0]


def test_impossible_options_are_refused():
    for options in ({"rank": 0}, {"modes": 0}, {"dropout": 1.0}):
        with pytest.raises(PlaitError):
            make(**options)
