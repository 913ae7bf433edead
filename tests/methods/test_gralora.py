"""GraLoRA against a grid of small LoRAs written with loops, in float64."""

import pytest
import torch
from torch import nn

import plait
from plait import kernels
from plait.errors import PlaitError
from tiny import scramble

FORMS = [
    {"rank": 4, "k": 2},
    {"rank": 6, "k": 3, "alpha": 5.0},
    {"rank": 2, "k": 1},
    {"rank": 4, "k": 2, "hybrid_rank": 3},
]


def make(rows=12, columns=18, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).to(dtype)
    adapter = plait.attach(model, "gralora", seed=2, **options)
    return model, adapter.deltas["0"], adapter


def oracle(delta):
    """dW block by block: (j, n) is s (rows n of B_j)^T (piece j of A_n)^T."""
    o, p = delta.options, dict(delta.named_parameters())
    rows, columns = delta.site.shape
    out, inp, piece = rows // o.k, columns // o.k, o.rank // o.k
    scale = 2.0 if o.alpha is None else o.alpha / (o.rank + o.hybrid_rank)
    dW = torch.zeros(rows, columns, dtype=torch.float64)
    for j in range(o.k):
        for n in range(o.k):
            A = p["A"][n][:, j * piece : (j + 1) * piece]
            B = p["B"][j][n * piece : (n + 1) * piece]
            dW[j * out : (j + 1) * out, n * inp : (n + 1) * inp] = (A @ B).t()
    if o.hybrid_rank:
        dW = dW + p["B_all"] @ p["A_all"]
    return scale * dW


@pytest.mark.parametrize("options", FORMS)
def test_output_and_gradients_equal_those_of_the_grid(options):
    model, delta, adapter = make(**options)
    scramble(adapter, 0.5)
    torch.testing.assert_close(delta.dense(), oracle(delta))
    x = torch.randn(2, 5, 18, dtype=torch.float64, requires_grad=True)
    G = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted = delta.site.forward(x) + x @ oracle(delta).t()
    inputs = [*adapter.parameters(), x]
    expected = torch.autograd.grad((wanted * G).sum(), inputs)
    for got in (model(x), delta.site.forward(x) + delta(x)):
        torch.testing.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad((got * G).sum(), inputs), expected, strict=True):
            torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), wanted)


def test_rank_is_k_times_r_and_the_lora_exact():
    for k in (1, 2):
        _, delta, adapter = make(rank=4, k=k)
        scramble(adapter, 0.5)
        assert torch.linalg.matrix_rank(delta.dense()) == 4 * k
        lora = adapter.to_lora().deltas["0"]
        assert lora.rank == 4 * k
        torch.testing.assert_close(lora.dense(), oracle(delta))


def test_a_grid_of_one_block_is_lora():
    _, delta, adapter = make(rank=3, k=1)
    scramble(adapter, 0.5)
    torch.testing.assert_close(delta.dense(), 2.0 * delta.B[0].t() @ delta.A[0].t())


def test_an_outlier_feature_reaches_only_the_pieces_of_its_own_block():
    model, delta, adapter = make(rank=4, k=2)
    scramble(adapter, 0.5)
    x, G = torch.randn(6, 18, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)

    def gradients(x):
        return torch.autograd.grad((model(x) * G).sum(), [delta.A, delta.B])

    A, B = gradients(x)
    x[:, 0] = 1000.0
    A_after, B_after = gradients(x)
    torch.testing.assert_close(A_after[1], A[1])
    torch.testing.assert_close(B_after[:, 2:], B[:, 2:])
    assert (B_after[:, :2] - B[:, :2]).abs().min() > 1


@pytest.mark.parametrize("options", FORMS)
def test_start_is_the_base_in_bits(options):
    model, delta, _ = make(dtype=torch.float32, **options)
    x = torch.randn(5, 18)
    assert torch.equal(model(x), delta.site.forward(x))
    assert delta.A.abs().max() <= (options["k"] / 18) ** 0.5


def test_count_is_that_of_lora():
    for options in FORMS:
        _, delta, adapter = make(**options)
        rank = options["rank"] + options.get("hybrid_rank", 0)
        assert adapter.num_parameters() == rank * (12 + 18)
        assert adapter.method.count([delta.site], delta.options) == rank * (12 + 18)


def test_x_and_one_row_for_each_rank_are_kept_for_backward():
    model, _, _ = make(rank=4, k=2)
    x, kept = torch.randn(100, 18, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    large = {t.data_ptr(): t.numel() for t in kept if t.numel() >= 100}
    assert sum(large.values()) <= x.numel() + 2 * 4 * 100 + 18 * 12  # x, v and W


def test_dropout_acts_in_training_only():
    model, delta, adapter = make(rank=4, k=2, hybrid_rank=2, dropout=0.5)
    scramble(adapter, 0.5)
    x = torch.randn(6, 18, dtype=torch.float64)
    model.eval()
    still = model(x)
    torch.testing.assert_close(still, delta.site.forward(x) + x @ oracle(delta).t())
    model.train()
    assert not torch.allclose(model(x), still)


def test_impossible_options_are_refused():
    for options, message in [
        ({"rank": 5, "k": 2}, "divide"),
        ({"rank": 20, "k": 5}, "divide"),
        ({"rank": 4, "dropout": 1.0}, "dropout"),
    ]:
        with pytest.raises(PlaitError, match=message):
            make(**options)
