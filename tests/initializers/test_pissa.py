"""PiSSA: principal factors, an untouched base, and PEFT's residual as the oracle."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.initializers.pissa import Pissa
from plait.linalg import principal_angles


def linear(method="lora", start=None, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    options = {"rank": 3, "alpha": 5.0, **options}
    start = start or Pissa(svd="exact")
    adapter = plait.attach(model, method, initializer=start, seed=2, **options)
    return model, adapter.deltas["0"], adapter


def test_the_model_starts_at_the_base_and_the_base_is_untouched():
    model = tiny.llama()
    before, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = plait.attach(model, "pissa", rank=4)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    tiny.losses(model, adapter, steps=2)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_factors_are_the_principal_part_with_the_scaling_divided_in():
    model, delta, _ = linear()
    U, S, Vh = torch.linalg.svd(model[0].weight.detach())
    root = torch.diag(S[:3] / delta.scaling)
    torch.testing.assert_close(delta.A @ delta.A.T, root)
    torch.testing.assert_close(delta.B.T @ delta.B, root)
    torch.testing.assert_close(delta.trained().dense(), (U[:, :3] * S[:3]) @ Vh[:3])
    residual = model[0].weight - delta.trained().dense()
    torch.testing.assert_close(torch.linalg.matrix_norm(residual, 2), S[3])


def test_the_randomised_svd_finds_nearly_the_same():
    model, delta, _ = linear(start=Pissa(depth=8))
    S = torch.linalg.svdvals(model[0].weight.detach())
    residual = (model[0].weight - delta.trained().dense()).norm()
    best = S[3:].square().sum().sqrt()
    assert best * (1 - 1e-9) <= residual <= best * 1.001


def test_forward_is_the_residual_plus_the_pair():
    model, delta, adapter = linear()
    residual = (model[0].weight - delta.trained().dense()).detach()
    tiny.scramble(adapter, 0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    want = F.linear(x, residual + delta.scaling * delta.B @ delta.A, model[0].bias)
    torch.testing.assert_close(model(x), want)


def test_export_is_a_lora_of_twice_the_rank_on_the_original_base():
    model, _, adapter = linear()
    tiny.scramble(adapter, 0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    want, low = model(x), adapter.to_lora()
    assert low.deltas["0"].rank == 6
    plait.detach(model)
    torch.testing.assert_close(model(x) + F.linear(x, low.deltas["0"].dense()), want)


def test_other_adapters_on_the_base_are_not_disturbed():
    model, _, _ = linear()
    other = plait.attach(model, "lora", rank=2, name="other")
    tiny.scramble(other, 0.5)
    alone = nn.Sequential(nn.Linear(12, 8)).double()
    alone.load_state_dict(model.state_dict())
    x = torch.randn(5, 12, dtype=torch.float64)
    want = alone(x) + F.linear(x, other.deltas["0"].dense())
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_works_with_any_method_of_pairs(method):
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, method, initializer="pissa", rank=4, seed=0)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]


def test_dora_over_pissa_stretches_the_residual_plus_the_pair():
    model, delta, adapter = linear("dora")
    residual = (model[0].weight - delta.scaling * delta.B @ delta.A).detach()
    tiny.scramble(adapter, 0.3)
    V = residual + delta.scaling * delta.B @ delta.A
    x = torch.randn(5, 12, dtype=torch.float64)
    want = F.linear(x, (delta.m / V.norm(dim=1))[:, None] * V, model[0].bias)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("method", ["vera", "lora-xs", "shira"])
def test_methods_without_a_pair_are_refused(method):
    with pytest.raises(plait.PlaitError, match="pair"):
        plait.attach(tiny.llama(), method, initializer="pissa")


def test_first_step_gradient_is_larger_than_with_lora():
    norms = {}
    for method in ("lora", "pissa"):
        model = tiny.llama()
        adapter = plait.attach(model, method, rank=4, alpha=4, seed=0)
        model(**tiny.batch()).loss.backward()
        norms[method] = sum(float(p.grad.square().sum()) for p in adapter.parameters()) ** 0.5
    assert norms["pissa"] > norms["lora"]


def test_convolutions_start_at_the_base():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 7, 7)
    before = model(x)
    plait.attach(model, "pissa", rank=3, targets=["0"])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_rank_above_the_shorter_side_takes_all_of_w():
    model, delta, _ = linear(rank=10)
    torch.testing.assert_close(delta.trained().dense(), model[0].weight)


def test_logits_equal_peft_after_the_same_training_move():
    peft = pytest.importorskip("peft")
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(model, "lora", initializer=Pissa(svd="exact"), rank=4, alpha=4)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules="all-linear"
    )
    theirs = peft.get_peft_model(other, config).eval()
    modules = dict(theirs.base_model.model.named_modules())
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            layer, A = modules[path], torch.randn(delta.A.shape, generator=g) * 0.1
            # An SVD's signs are free, so the same move must be made relative to the product.
            for B, A0 in ((layer.lora_B["default"].weight, layer.lora_A["default"].weight),):
                signs = torch.sign((B * delta.B).sum(0))
                delta.A.mul_(signs[:, None]).add_(A)
                delta.B.mul_(signs)
                A0.add_(A)
    want = theirs(input_ids=tiny.batch()["input_ids"]).logits
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-3, atol=2e-4)


@pytest.mark.smollm2
def test_the_sketch_finds_the_principal_subspaces_of_a_real_model():
    from plait.training.bases import load_base

    model, _ = load_base("smollm2-135m", dtype="float32")
    adapter = plait.attach(model, "pissa", rank=8, seed=0, layers=[0, 29])
    for delta in adapter.deltas.values():
        U, _, Vh = torch.linalg.svd(delta.site.weight().detach().double(), full_matrices=False)
        B, A = torch.linalg.qr(delta.B.detach().double()).Q, delta.A.detach().double()
        assert float(principal_angles(B, U[:, :8]).max()) < 1e-3
        assert float(principal_angles(torch.linalg.qr(A.mT).Q, Vh[:8].mT).max()) < 1e-3
