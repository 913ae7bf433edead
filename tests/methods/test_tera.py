"""TeRA against an einsum over the whole network, in float64."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny import llama, scramble

FORMS = [
    {"rank": 2},
    {"rank": 64},
    {"rank": 2, "modes": 3, "scaling": 0.5},
    {"rank": 4, "modes": 1},
]


def make(rows=18, columns=24, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    adapter = plait.attach(model, "tera", seed=2, **options)
    return model, adapter.deltas["0"], adapter


def oracle(delta):
    """The Tucker tensor, one mode product after the other."""
    modes, (rows, columns) = 2 * delta.options.modes, delta.site.shape
    U = [delta.shared[f"U{k}_{rows}x{columns}"] for k in range(modes)]
    d = [delta.get_parameter(f"d{k}") for k in range(modes)]
    tensor = delta.shared[f"G_{rows}x{columns}"].view([len(v) for v in d])
    for k in range(modes):
        moved = tensor.movedim(k, -1) @ (U[k] * d[k]).t()
        tensor = moved.movedim(-1, k)
    return delta.options.scaling * tensor.reshape(rows, columns)


@pytest.mark.parametrize("options", FORMS)
def test_output_and_gradients_equal_those_of_the_tensor(options):
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
def test_start_is_the_base_in_bits_and_only_the_zero_vector_moves(options):
    model, delta, _ = make(**options)
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.equal(model(x), delta.site.forward(x))
    model(x).square().sum().backward()
    moved = {n for n, p in delta.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {f"d{options.get('modes', 2) - 1}"}


def test_rank_reaches_its_bound():
    for rank, bound in [(2, 4), (3, 9), (64, 18)]:
        _, delta, adapter = make(rank=rank)
        scramble(adapter, 0.5)
        assert torch.linalg.matrix_rank(delta.dense()) == bound


def test_two_modes_and_an_identity_core_are_vera_without_its_output_vector():
    _, delta, adapter = make(rank=4, modes=1)
    scramble(adapter, 0.5)
    delta.shared["G_18x24"].copy_(torch.eye(4))
    U_1, U_2 = delta.shared["U0_18x24"], delta.shared["U1_18x24"]
    torch.testing.assert_close(delta.dense(), U_1 @ torch.diag(delta.d0 * delta.d1) @ U_2.t())


def test_a_small_network_is_exactly_a_lora():
    _, delta, adapter = make(rank=2)
    scramble(adapter, 0.5)
    lora = adapter.to_lora().deltas["0"]
    assert lora.rank == 4
    torch.testing.assert_close(lora.dense(), oracle(delta))
    assert make(rank=64)[1].factors() is None


def test_entries_of_the_full_network_have_variance_one_over_the_width():
    _, delta, _ = make(rows=512, columns=1024, rank=8)
    with torch.no_grad():
        delta.d1.fill_(1.0)
    assert float(delta.dense().detach().var()) * 1024 == pytest.approx(1.0, rel=0.5)


def test_networks_are_shared_by_shape_and_never_saved():
    model = llama()
    adapter = plait.attach(model, "tera", rank=4, seed=3)
    shapes = {d.site.shape for d in adapter.deltas.values()}
    assert len(adapter.seeded_tensors()) == 5 * len(shapes) < len(adapter.deltas) * 5
    assert all(".d" in name for name in adapter.state_dict())
    pointers = {d._shared("G").data_ptr() for d in adapter.deltas.values()}
    assert len(pointers) == len(shapes)


def test_parameters_are_the_sum_of_the_bonds():
    for options, wanted in [({"rank": 64}, 6 + 3 + 6 + 4), ({"rank": 3}, 3 + 3 + 3 + 3)]:
        _, delta, adapter = make(**options)
        assert adapter.num_parameters() == wanted
        assert adapter.method.count([delta.site], delta.options) == wanted


def test_impossible_options_are_refused():
    for options in ({"rank": 0}, {"modes": 0}, {"dropout": 1.0}, {"overrides": {"0": {"rank": 1}}}):
        with pytest.raises(PlaitError):
            make(**options)
