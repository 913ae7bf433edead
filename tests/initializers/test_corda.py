"""CorDA: the paper's formula with its inverse, optimality on the data, and PEFT as the oracle."""

import dataclasses
import importlib.util
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.initializers.corda import Corda

MODES = ["ipm", "kpm"]


def inputs(width=12, count=200):
    g = torch.Generator().manual_seed(0)
    sizes = torch.linspace(3, 0.1, width, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    return torch.randn(count, width, generator=g, dtype=torch.float64) * sizes @ mix


def linear(shape=(8, 12), mode="ipm", method="corda", scale=1.0, **options):
    rows, columns = shape
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    X = scale * inputs(columns)
    start = Corda(mode=mode)
    adapter = plait.attach(
        model,
        method,
        initializer=start,
        data=[{"input": X}],
        seed=2,
        **{"rank": 3, "alpha": 6.0, **options},
    )
    return model, adapter.deltas["0"], X


def papers_parts(W, X, damp=0.01):
    """U, S, V^T C^-1 as the paper has them."""
    C = X.T @ X / len(X)
    C = C + damp * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    return U, S, Vh @ torch.linalg.inv(C)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_the_pair_is_the_papers(shape, mode):
    model, delta, X = linear(shape, mode)
    U, S, V = papers_parts(model[0].weight.detach(), X)
    kept = slice(0, 3) if mode == "ipm" else slice(-3, None)
    want = (U[:, kept] * S[kept]) @ V[kept]
    torch.testing.assert_close(delta.trained().dense(), want, rtol=1e-5, atol=1e-7)
    # Both factors carry the root of S, up to the unit of C.
    shares = torch.diag(delta.B.T @ delta.B) / S[kept]
    torch.testing.assert_close(shares, shares[:1].expand(3), rtol=1e-5, atol=0)


def test_all_components_together_are_w():
    model, delta, _ = linear(rank=8)
    torch.testing.assert_close(delta.trained().dense(), model[0].weight.detach())


@pytest.mark.parametrize("mode", MODES)
def test_no_other_choice_of_components_has_larger_or_smaller_outputs(mode):
    model, delta, X = linear(mode=mode)
    U, S, V = papers_parts(model[0].weight.detach(), X)
    C = X.T @ X / len(X)

    def size(components):
        return ((U[:, components] * S[components]) @ V[components] @ C).norm()

    mine = (delta.trained().dense() @ C).norm()
    others = [size([i, j, k]) for i in range(8) for j in range(i) for k in range(j)]
    bound = max(others) if mode == "ipm" else min(others)
    torch.testing.assert_close(mine, bound, rtol=1e-4, atol=1e-8)
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(8, 3, generator=g, dtype=torch.float64)).Q
    random = (Q @ Q.T @ model[0].weight.detach() @ C).norm()
    assert mine > random if mode == "ipm" else mine < random


def test_the_unit_of_the_inputs_does_not_matter():
    _, one, _ = linear()
    _, other, _ = linear(scale=1000.0)
    torch.testing.assert_close(one.A, other.A)
    torch.testing.assert_close(one.B, other.B)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_starts_at_the_base_and_the_base_is_untouched(mode):
    model = tiny.llama()
    before, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = plait.attach(
        model, "corda", rank=4, initializer=Corda(mode=mode), data=[tiny.batch()]
    )
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-3, atol=1e-3)
    tiny.losses(model, adapter, steps=2)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_ipm_takes_more_of_the_outputs_than_kpm_everywhere():
    sizes = {}
    for mode in MODES:
        model = tiny.llama()
        start = Corda(mode=mode)
        adapter = plait.attach(model, "corda", rank=4, initializer=start, data=[tiny.batch()])
        sizes[mode] = {p: float(d.trained().norm().detach()) for p, d in adapter.deltas.items()}
    assert all(sizes["ipm"][p] > sizes["kpm"][p] for p in sizes["ipm"])


def test_forward_is_the_residual_plus_the_pair():
    model, delta, _ = linear(mode="kpm")
    residual = (model[0].weight - delta.trained().dense()).detach()
    tiny.scramble(plait.adapters(model)["default"], 0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    want = F.linear(x, residual + delta.scaling * delta.B @ delta.A, model[0].bias)
    torch.testing.assert_close(model(x), want)


def test_a_rank_above_the_shorter_side_takes_all_of_w():
    model, delta, _ = linear(rank=10)
    torch.testing.assert_close(delta.trained().dense(), model[0].weight.detach())


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_never_vary_and_directions_that_w_forgets(mode):
    model = nn.Sequential(nn.Linear(12, 8, bias=False)).double()
    with torch.no_grad():
        model[0].weight[5:] = 0
    before = model[0].weight.clone()
    start = Corda(mode=mode)
    for X in (torch.zeros(4, 12).double(), torch.ones(4, 12).double()):
        adapter = plait.attach(model, "lora", initializer=start, rank=6, data=[{"input": X}])
        adapter.check()
        x = torch.randn(3, 12, dtype=torch.float64)
        torch.testing.assert_close(model(x), F.linear(x, before))
        plait.detach(model)


def test_embeddings_keep_their_own_start():
    model = tiny.llama()
    targets = ["embed_tokens", "q_proj"]
    adapter = plait.attach(model, "corda", rank=2, targets=targets, data=[tiny.batch()])
    embedding = adapter.deltas["model.embed_tokens"]
    assert embedding.A.abs().sum() == 0 and "held_A" not in embedding._buffers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training(method, mode):
    model = tiny.llama()
    start = Corda(mode=mode)
    adapter = plait.attach(
        model, method, initializer=start, rank=4, data=[tiny.batch(rows=8)], seed=0
    )
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_residual_equals_pefts(mode, monkeypatch):
    peft = pytest.importorskip("peft")
    if importlib.util.find_spec("attr") is None:  # of which PEFT's file wants `dataclass` only
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    batch = tiny.batch(rows=1, tokens=48)
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(
        model, "corda", rank=4, alpha=8, initializer=Corda(mode=mode), data=[batch]
    )
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights="corda",
        target_modules="(?!.*lm_head).*_proj",
        corda_config=CordaConfig(corda_method=mode),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_corda(other, config, run_model=lambda: other(input_ids=batch["input_ids"]))
        theirs = peft.get_peft_model(other, config)
    modules = dict(theirs.base_model.model.named_modules())
    assert len(adapter.deltas) == 14
    for path, delta in adapter.deltas.items():
        W = delta.site.weight()
        mine = W - delta.trained().dense()
        their = modules[path].base_layer.weight
        torch.testing.assert_close(mine, their, rtol=0, atol=2e-3 * float(W.abs().max()))


def test_data_and_sound_options_are_asked_for():
    with pytest.raises(plait.PlaitError, match="data="):
        plait.attach(tiny.llama(), "corda")
    for wrong in ({"mode": "apm"}, {"damp": 0.0}):
        with pytest.raises(plait.PlaitError, match="corda"):
            Corda(**wrong)
