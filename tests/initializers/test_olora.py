"""OLoRA: an orthonormal B, the part of W that it spans, and PEFT as the oracle."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(method="lora", **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    adapter = plait.attach(
        model, method, initializer="olora", seed=2, **{"rank": 3, "alpha": 5.0, **options}
    )
    return model, adapter.deltas["0"], adapter


def test_b_is_orthonormal_and_the_pair_is_the_part_of_w_that_it_spans():
    model, delta, _ = linear()
    W = model[0].weight
    torch.testing.assert_close(delta.B.T @ delta.B, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(delta.B @ delta.A, delta.B @ delta.B.T @ W)


def test_factors_are_those_of_the_qr_decomposition_of_all_of_w():
    model, delta, _ = linear()
    Q, R = torch.linalg.qr(model[0].weight.detach())
    torch.testing.assert_close(delta.B, Q[:, :3])
    torch.testing.assert_close(delta.A, R[:3])


def test_with_scaling_one_the_residual_has_no_first_columns():
    model, delta, _ = linear(alpha=3.0)
    residual = model[0].weight - delta.trained().dense()
    torch.testing.assert_close(residual[:, :3], torch.zeros(8, 3, dtype=torch.float64))
    assert residual[:, 3:].abs().min() > 0


def test_the_model_starts_at_the_base_and_the_base_is_untouched():
    model = tiny.llama()
    before, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = plait.attach(model, "olora", rank=4)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    tiny.losses(model, adapter, steps=2)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_forward_is_the_residual_plus_the_pair():
    model, delta, adapter = linear()
    residual = (model[0].weight - delta.trained().dense()).detach()
    tiny.scramble(adapter, 0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    want = F.linear(x, residual + delta.scaling * delta.B @ delta.A, model[0].bias)
    torch.testing.assert_close(model(x), want)


def test_a_rank_above_the_shorter_side_takes_all_of_w():
    model, delta, adapter = linear(rank=10, alpha=10.0)
    torch.testing.assert_close(delta.trained().dense(), model[0].weight)
    assert adapter.num_parameters() == 10 * (12 + 8)


def test_convolutions_start_at_the_base():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 7, 7)
    before = model(x)
    plait.attach(model, "olora", rank=3, targets=["0"])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_works_with_any_method_of_pairs(method):
    model = tiny.llama()
    adapter = plait.attach(model, method, initializer="olora", rank=4, alpha=4, seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]


def test_logits_equal_pefts_after_the_same_training_move():
    peft = pytest.importorskip("peft")
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(model, "olora", rank=4, alpha=8)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="olora", target_modules="all-linear"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(other, config).eval()
    modules = dict(theirs.base_model.model.named_modules())
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            A, B = (modules[path].get_submodule(f"lora_{n}.default").weight for n in "AB")
            torch.testing.assert_close(delta.A, A, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(delta.B, B, rtol=1e-3, atol=1e-4)
            for mine, their in ((delta.A, A), (delta.B, B)):
                move = 0.1 * torch.randn(mine.shape, generator=g)
                mine.add_(move)
                their.add_(move)
    want = theirs(input_ids=tiny.batch()["input_ids"]).logits
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-3, atol=1e-3)
