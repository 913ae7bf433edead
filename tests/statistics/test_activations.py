import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.statistics import InputSVD, SecondMoment, activation_pass


class Probe(nn.Module):
    """Reads its input with `a`, `b` (the same tensor) and `c` (another)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x, attention_mask=None):
        return self.a(x).sum() + self.b(x).sum() + self.c(x * 2).sum()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_second_moment_streams():
    model = Probe()
    x, y = inputs(2, 5, 6), inputs(3, 4, 6, seed=1)
    sites = plait.find_sites(model, "all-linear")
    found = activation_pass(model, sites, [{"x": x}, {"x": y}], SecondMoment())
    rows = torch.cat([x.reshape(-1, 6), y.reshape(-1, 6)]).double()
    torch.testing.assert_close(found["a"].double(), rows.T @ rows / len(rows), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["c"], 4 * found["a"])


def test_covariance_is_centred():
    model = Probe()
    x = inputs(2, 50, 6) + 3
    found = activation_pass(model, plait.find_sites(model, ["a"]), [{"x": x}], SecondMoment(True))
    want = torch.cov(x.reshape(-1, 6).double().T, correction=0)
    torch.testing.assert_close(found["a"].double(), want, atol=1e-4, rtol=1e-4)


def test_half_precision_inputs_do_not_overflow():
    model = nn.Sequential(nn.Linear(4, 4)).half()
    x = torch.full((64, 4), 200.0, dtype=torch.float16)
    found = activation_pass(model, plait.find_sites(model, ["0"]), [{"input": x}], SecondMoment())
    torch.testing.assert_close(found["0"], torch.full((4, 4), 40000.0))


def test_sites_that_read_one_tensor_share_one_reduction():
    model = Probe()
    updates = []

    class Counting:
        done = False

        def __init__(self, width):
            self.rows = 0

        def update(self, x):
            updates.append(x)

        def result(self):
            return object()

    sites = plait.find_sites(model, "all-linear")
    found = activation_pass(model, sites, [{"x": inputs(2, 6)}] * 3, Counting)
    assert len(updates) == 6  # a with b, and c, on three batches
    assert found["a"] is found["b"] and found["a"] is not found["c"]
    updates.clear()
    activation_pass(model, sites, [{"x": inputs(2, 6)}] * 3, Counting, share=False)
    assert len(updates) == 9


def test_llama_q_k_v_share_and_gate_up_share():
    model = tiny.llama()
    sites = plait.find_sites(model, "all-linear", layers=0)
    found = activation_pass(model, sites, [tiny.batch()], SecondMoment())
    of = {p.rpartition(".")[2]: v for p, v in found.items()}
    assert of["q_proj"] is of["k_proj"] is of["v_proj"]
    assert of["gate_proj"] is of["up_proj"]
    assert len({id(v) for v in of.values()}) == 4


def test_sites_that_stop_sharing_are_refused():
    class Fickle(Probe):
        def forward(self, x, apart):
            return self.a(x).sum() + self.b(x * 2 if apart else x).sum()

    model = Fickle()
    sites = plait.find_sites(model, ["a", "b"])
    data = [{"x": inputs(2, 6), "apart": False}, {"x": inputs(2, 6), "apart": True}]
    with pytest.raises(plait.PlaitError, match="share=False"):
        activation_pass(model, sites, data, SecondMoment())
    apart = activation_pass(model, sites, data, SecondMoment(), share=False)
    torch.testing.assert_close(apart["b"], 2.5 * apart["a"])


def test_padding_and_unlabelled_tokens_do_not_count():
    model = Probe()
    x = inputs(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 5, 5, 5], [-100, -100, 5, 5]])
    site = plait.find_sites(model, ["a"])
    data = [{"x": x, "attention_mask": mask, "labels": labels}]
    found = activation_pass(model, site, data, SecondMoment())["a"]
    kept = x[(mask == 1) & (labels != -100)]
    torch.testing.assert_close(found, kept.T @ kept / 4)
    found = activation_pass(model, site, data, SecondMoment(), ignore_unlabelled=False)["a"]
    kept = x[mask == 1]
    torch.testing.assert_close(found, kept.T @ kept / 7)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.Conv2d(3, 5, (2, 3), stride=2, dilation=2, padding=(0, 2), bias=False),
        nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect", bias=False),
        nn.Conv1d(3, 5, 4, stride=3, padding=2, bias=False),
    ],
)
def test_patches_of_a_convolution_are_what_its_kernel_sees(conv):
    """With the patches' second moment M, the mean square of a kernel's output is w M w."""
    model = nn.Sequential(conv)
    x = inputs(2, 3, 9) if isinstance(conv, nn.Conv1d) else inputs(2, 3, 9, 8)
    sites = plait.find_sites(model, ["0"])
    M = activation_pass(model, sites, [{"input": x}], SecondMoment())["0"]
    W = conv.weight.detach().flatten(1)
    got = torch.einsum("oi,ij,oj->o", W, M, W)
    want = conv(x).detach().transpose(0, 1).flatten(1).square().mean(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_incremental_svd_equals_the_svd_of_everything():
    model = Probe()
    scale = torch.tensor([10.0, 6, 3, 0.3, 0.2, 0.1])
    rotate = torch.linalg.qr(inputs(6, 6, seed=9)).Q
    xs = [(inputs(40, 6, seed=s) * scale) @ rotate for s in range(5)]
    site = plait.find_sites(model, ["a"])
    found = activation_pass(model, site, [{"x": x} for x in xs], InputSVD(3, oversample=2))["a"]
    every = torch.cat(xs).double()
    _, S, Vh = torch.linalg.svd(every)
    torch.testing.assert_close(found.singular_values.double(), S[:3], rtol=1e-4, atol=0)
    torch.testing.assert_close((found.components.double() @ Vh[:3].T).abs(), torch.eye(3).double(),
                               atol=1e-3, rtol=0)  # fmt: skip
    assert found.energy == pytest.approx(float(every.square().sum()), rel=1e-6)
    assert found.count == 200
    assert float(found.explained.sum()) == pytest.approx(
        float(S[:3].square().sum() / S.square().sum()), rel=1e-4
    )


def test_a_converged_pass_reads_no_further():
    model = Probe()
    read = []

    def batches():
        for i in range(10):
            read.append(i)
            yield {"x": inputs(30, 6, seed=i % 2) * torch.tensor([9.0, 5, 1, 1, 1, 1])}

    activation_pass(model, plait.find_sites(model, ["a"]), batches(), InputSVD(2, tau=0.9))
    assert len(read) < 10


def test_model_flags_and_random_state_are_unchanged():
    class Noisy(Probe):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5)).sum()  # draws even in eval mode

    model = Noisy().train()
    random = torch.get_rng_state()
    activation_pass(model, plait.find_sites(model, ["a"]), [{"x": inputs(2, 6)}], SecondMoment())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
