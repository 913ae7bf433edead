"""SoKA: the Kronecker SVD of W, the choice of K, and a start that is the base in bits."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from plait.methods._kronecker_svd import choose_terms
from tiny import scramble

ALL = {"terms": 1000, "energy": 1.0, "elbow": False}


def make(weight=None, rows=12, columns=20, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).to(dtype)
    if weight is not None:
        model[0].weight.data.copy_(weight)
    adapter = plait.attach(model, "soka", seed=2, **options)
    return model, adapter.deltas["0"], adapter


def kron_sum(A, B):
    return sum(torch.kron(a, b) for a, b in zip(A, B, strict=True))


def test_all_terms_rebuild_the_weight():
    _, delta, _ = make(**ALL)
    assert delta.A.shape == (12, 3, 4) and delta.B.shape == (12, 4, 5)
    torch.testing.assert_close(kron_sum(delta.A, delta.B), delta.site.weight(), atol=1e-10, rtol=0)


def test_a_truncation_leaves_the_tail_of_the_spectrum():
    _, delta, _ = make(**{**ALL, "terms": 3})
    W = delta.site.weight()
    blocks = torch.stack(
        [W[4 * i : 4 * i + 4, 5 * j : 5 * j + 5] for i in range(3) for j in range(4)]
    )
    S = torch.linalg.svdvals(blocks.flatten(1))
    left = (W - kron_sum(delta.A, delta.B)).norm()
    torch.testing.assert_close(left, S[3:].square().sum().sqrt())
    norms = delta.A.flatten(1).norm(dim=1), delta.B.flatten(1).norm(dim=1)
    torch.testing.assert_close(*norms)  # both factors carry sqrt(sigma)


@pytest.mark.parametrize("by_factors", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_in_bits_and_its_dw_zero(dtype, by_factors, monkeypatch):
    model, delta, _ = make(dtype=dtype, terms=5, elbow=False)
    monkeypatch.setattr(type(delta), "_by_factors", lambda self, dtype: by_factors)
    x = torch.randn(3, 7, 20).to(dtype)
    assert torch.equal(model(x), delta.site.forward(x))
    assert not delta.dense().any()


@pytest.mark.parametrize("by_factors", [True, False])
def test_output_and_gradients_equal_those_of_the_dense_sum(by_factors, monkeypatch):
    model, delta, adapter = make(terms=3, elbow=False, energy=1.0)
    monkeypatch.setattr(type(delta), "_by_factors", lambda self, dtype: by_factors)
    held = kron_sum(delta.held_A, delta.held_B)
    scramble(adapter, 0.5)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    G = torch.randn(6, 12, dtype=torch.float64)
    dW = kron_sum(delta.A, delta.B) - held
    torch.testing.assert_close(delta.dense(), dW)
    wanted = delta.site.forward(x) + x @ dW.t()
    torch.testing.assert_close(model(x), wanted)
    inputs = [delta.A, delta.B, x]
    got = torch.autograd.grad((model(x) * G).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((wanted * G).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_a_kronecker_product_needs_one_term():
    W = torch.kron(torch.randn(3, 4), torch.randn(4, 5)).double()
    _, delta, adapter = make(W, terms=8)
    assert delta.options.terms == 1 and adapter.num_parameters() == 3 * 4 + 4 * 5
    torch.testing.assert_close(kron_sum(delta.A, delta.B), W)


def test_energy_counts_the_whole_weight():
    S = torch.tensor([3.0, 2.0, 1.0])
    for energy, wanted in [(0.1, 1), (0.64, 1), (0.65, 2), (0.92, 2), (0.95, 3)]:
        assert choose_terms(S, S.square().sum(), energy, elbow=False) == wanted
    assert choose_terms(S, torch.tensor(100.0), 0.9, elbow=False) == 4


def test_a_half_precision_adapter_chooses_as_a_full_one_does():
    chosen = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(96, 96)).bfloat16()
        adapter = plait.attach(
            model, "soka", terms=64, energy=0.6, elbow=False, dtype=dtype, seed=2
        )
        chosen.append(adapter.deltas["0"].options.terms)
        assert not adapter.deltas["0"].dense().any()
    assert chosen[0] == chosen[1] < 64


def test_the_elbow_is_the_point_farthest_below_the_chord():
    total = torch.tensor(1e9)
    assert choose_terms(torch.tensor([9.0, 8.0, 1.0, 0.9, 0.8, 0.7]), total, 1.0, elbow=True) == 2
    assert choose_terms(torch.tensor([9.0, 1.0, 0.9, 0.8]), total, 1.0, elbow=True) == 1
    for unbent in ([5.0, 4.0, 3.0, 2.0], [5.0, 4.9, 4.0, 1.0], [2.0, 2.0, 2.0]):
        assert choose_terms(torch.tensor(unbent), total, 1.0, elbow=True) == len(unbent) + 1


def test_files_know_how_many_terms_were_chosen(tmp_path):
    model, delta, adapter = make(terms=8)
    assert 1 <= delta.options.terms < 8
    scramble(adapter, 0.3)
    adapter.save(tmp_path / "a")
    x = torch.randn(4, 20, dtype=torch.float64)
    wanted = model(x)
    fresh = nn.Sequential(nn.Linear(20, 12)).double()
    fresh.load_state_dict(model.state_dict())
    again = plait.load(fresh, tmp_path / "a")
    assert again.deltas["0"].options.terms == delta.options.terms
    torch.testing.assert_close(fresh(x), wanted)


def test_wide_layers_with_few_terms_multiply_by_the_factors():
    _, small, _ = make(terms=1)
    assert not small._by_factors(torch.float32)
    model = nn.Sequential(nn.Linear(1024, 1024))
    wide = plait.attach(model, "soka", terms=1).deltas["0"]
    assert wide._by_factors(torch.bfloat16)
    x, kept = torch.randn(2, 1024, requires_grad=True).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        wide(x)
    assert max(kept) <= 2 * 1024


def test_count_by_formula():
    _, delta, adapter = make(terms=3, elbow=False, energy=1.0)
    assert adapter.num_parameters() == 3 * (3 * 4 + 4 * 5)
    assert adapter.method.count([delta.site], delta.options) == adapter.num_parameters()


def test_impossible_options_are_refused():
    for options in ({"terms": 0}, {"energy": 0.0}, {"energy": 1.5}, {"factor": 0}, {"dropout": 1}):
        with pytest.raises(PlaitError):
            make(**options)
