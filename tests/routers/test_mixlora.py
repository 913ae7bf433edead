"""MixLoRA against whole experts evaluated one by one, token by token."""

import copy
import pickle

import pytest
import torch

import plait
from plait.adapter import PairDelta
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls, tiny_llama, tokens

PATH = "model.layers.0.mlp"


def make(**options):
    model = tiny_llama(mlp_bias=options.pop("mlp_bias", False))
    adapter = plait.attach(model, "mixlora", **{"rank": 3, "experts": 5, "seed": 1, **options})
    return model, adapter, adapter.deltas[PATH]


def perturb(adapter, size=0.2):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn_like(p))


def naive_weights(delta, h):
    """[T, N] by the card, from its own softmax."""
    o = delta.options
    q = torch.softmax(h @ delta.router.detach().double().t(), -1)
    out = torch.zeros_like(q)
    for t, row in enumerate(q):
        best = row.argsort(descending=True)
        if o.strategy == "top-k":
            best = best[: o.top_k]
        else:
            total, count = 0.0, 0
            while count < len(best) and total < o.top_p:
                total, count = total + row[best[count]], count + 1
            best = best[:count]
        out[t, best] = row[best] / row[best].sum() if o.renormalizes else row[best]
    return out


def naive(delta, x):
    """sum_e w_e D_e(act(G_e h) * U_e h), every expert a dense copy of the block, in float64."""
    ffn = copy.deepcopy(delta.site.base).double()
    h = x.double().reshape(-1, x.shape[-1])
    weights = naive_weights(delta, h)
    s, total = delta.options.scaling, 0.0

    def linear(name, e, v):
        module = getattr(ffn, f"{name}_proj")
        A, B = (delta.get_parameter(f"{m}_{name}").detach().double() for m in "AB")
        dW = s * B[:, e] @ A[e]
        return torch.nn.functional.linear(v, module.weight + dW, module.bias)

    for e in range(delta.options.experts):
        z = torch.nn.functional.silu(linear("gate", e, h)) * linear("up", e, h)
        total = total + weights[:, e : e + 1] * linear("down", e, z)
    return total.view(x.shape)


CASES = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1, "renormalize": False},
    {"strategy": "top-p", "top_p": 0.5},
    {"strategy": "top-p", "renormalize": True},
]


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_block_equals_the_naive_experts(options, mlp_bias):
    model, adapter, delta = make(mlp_bias=mlp_bias, **options)
    perturb(adapter)
    if mlp_bias:
        with torch.no_grad():
            for name in ("gate", "up", "down"):
                getattr(delta.site.base, f"{name}_proj").bias.normal_()
    x = torch.randn(2, 6, 32)
    wanted = naive(delta, x)
    got = model.model.layers[0].mlp(x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    y = delta.site.forward(x)
    torch.testing.assert_close((y + delta(x, y)).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"strategy": "top-p", "renormalize": True}])
def test_start_is_the_frozen_model(options):
    model, _, _ = make(**options)
    got = model(tokens()).logits
    plait.activate(model, {})
    torch.testing.assert_close(got, model(tokens()).logits, rtol=1e-6, atol=1e-6)


def test_weights_that_do_not_sum_to_one_declare_that_they_start_elsewhere():
    assert make()[2].traits.zero_start
    assert not make(strategy="top-p")[2].traits.zero_start
    assert not make(top_k=1, renormalize=False)[2].traits.zero_start


def test_attention_has_plain_loras_and_the_blocks_have_mixtures():
    _, adapter, _ = make()
    kinds = {p: type(d) for p, d in adapter.deltas.items()}
    for layer in range(2):
        for name in "qkvo":
            assert kinds.pop(f"model.layers.{layer}.self_attn.{name}_proj") is PairDelta
        assert kinds.pop(f"model.layers.{layer}.mlp") is adapter.method.delta
    assert not kinds  # nothing beneath a block, no head


def test_ffn_targets_leave_attention_alone():
    model = tiny_llama()
    adapter = plait.attach(model, "mixlora", targets="ffn", rank=2, experts=3)
    assert list(adapter.deltas) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_identical_experts_are_one_block_with_loras():
    model, adapter, delta = make()
    perturb(adapter)
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            A, B = delta.get_parameter(f"A_{name}"), delta.get_parameter(f"B_{name}")
            A.copy_(A[:1].expand_as(A))
            B.copy_(B[:, :1].expand_as(B))
    plain = tiny_llama()
    lora = plait.attach(plain, "lora", targets=["gate_proj", "up_proj", "down_proj"], rank=3)
    for name in ("gate", "up", "down"):
        A, B = delta.get_parameter(f"A_{name}")[0], delta.get_parameter(f"B_{name}")[:, 0]
        lora.deltas[f"{PATH}.{name}_proj"].set_pair(A.detach(), B.detach())
    x = torch.randn(2, 6, 32)
    got, wanted = model.model.layers[0].mlp(x), plain.model.layers[0].mlp(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_permuting_experts_with_their_router_rows_changes_nothing():
    model, adapter, delta = make()
    perturb(adapter)
    x = torch.randn(2, 6, 32)
    wanted = model.model.layers[0].mlp(x)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        delta.router.copy_(delta.router[order])
        for name in ("gate", "up", "down"):
            A, B = delta.get_parameter(f"A_{name}"), delta.get_parameter(f"B_{name}")
            A.copy_(A[order])
            B.copy_(B[:, order])
    torch.testing.assert_close(model.model.layers[0].mlp(x), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_dense_experts():
    model, adapter, delta = make(top_k=5)
    perturb(adapter)
    model, delta = model.double(), delta.double()
    x = torch.randn(1, 4, 32, dtype=torch.double, requires_grad=True)
    G = torch.randn(1, 4, 32, dtype=torch.double)
    names = [n for n, _ in delta.named_parameters()]
    inputs = [x, *delta.parameters()]
    grads = torch.autograd.grad((model.model.layers[0].mlp(x) * G).sum(), inputs)
    ffn, s = delta.site.base, delta.options.scaling
    w = torch.softmax(x @ delta.router.t(), -1)
    total = 0.0
    p = dict(delta.named_parameters())
    for e in range(5):
        live = {
            n: getattr(ffn, f"{n}_proj").weight + s * p[f"B_{n}"][:, e] @ p[f"A_{n}"][e]
            for n in ("gate", "up", "down")
        }
        z = torch.nn.functional.silu(x @ live["gate"].t()) * (x @ live["up"].t())
        total = total + w[..., e : e + 1] * (z @ live["down"].t())
    wanted = torch.autograd.grad((total * G).sum(), inputs)
    for name, got, want in zip(["x", *names], grads, wanted, strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


def balance_oracle(adapter, seen, mask=None):
    """The card's loss over all blocks' concatenated logits, j by j."""
    deltas = [d for d in adapter.deltas.values() if d.site.kind == "module"]
    N, k = deltas[0].options.experts, deltas[0].options.top_k
    rows = []
    for delta in deltas:
        h = seen[delta.site.path].double()
        q = torch.softmax(h @ delta.router.double().t(), -1).reshape(-1, N)
        rows.append(q if mask is None else q[mask.flatten().bool()])
    q = torch.cat(rows)
    order = q.argsort(-1, descending=True)
    P, total = q.mean(0), 0.0
    for j in range(k):
        f = torch.nn.functional.one_hot(order[:, j], N).double().mean(0)
        total = total + (f * P).sum()
    return N * total


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_equals_its_formula(masked):
    model, adapter, _ = make(balance=0.5)
    perturb(adapter)
    mask = torch.ones(8, 12, dtype=torch.long)
    if masked:
        mask[:, 9:] = 0
    seen = {}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp"
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: seen.update({path: args[0].detach()})
        )
    with plait.routing(model, attention_mask=mask if masked else None):
        model(tokens())
    wanted = 0.5 * balance_oracle(adapter, seen, mask if masked else None)
    torch.testing.assert_close(plait.auxiliary_loss(model).double(), wanted, rtol=1e-5, atol=1e-6)


def test_balance_loss_is_k_at_balance_and_larger_when_one_expert_gets_all():
    model, adapter, _ = make(balance=1.0, top_k=2)
    with torch.no_grad():
        for delta in adapter.deltas.values():
            if delta.site.kind == "module":
                delta.router.zero_()
    model(tokens())
    assert plait.auxiliary_loss(model).item() == pytest.approx(2.0)
    model, adapter, _ = make(balance=1.0, top_k=1)
    for name in ("model.layers.0", "model.layers.1"):
        router = adapter.deltas[f"{name}.mlp"].router
        norm = model.get_submodule(f"{name}.post_attention_layernorm")
        with torch.no_grad():
            router.zero_()
            router[0, 0] = 50.0
            norm.weight[0] = 0.0
        model.get_submodule(f"{name}.mlp").register_forward_pre_hook(
            lambda m, args: (args[0] + torch.eye(32)[0],)
        )
    model(tokens())
    assert plait.auxiliary_loss(model).item() == pytest.approx(5.0, rel=1e-3)


def test_router_learns_from_the_task_unless_one_renormalised_expert_is_active():
    for options, learns in (
        ({"top_k": 2}, True),
        ({"top_k": 1}, False),
        ({"top_k": 1, "renormalize": False}, True),
    ):
        model, adapter, delta = make(**options)
        perturb(adapter)
        model(tokens(), labels=tokens()).loss.backward()
        assert bool(delta.router.grad.abs().sum() > 0) == learns


def test_base_projections_run_once_whatever_the_number_of_experts():
    model, adapter, delta = make(top_k=3)
    perturb(adapter)
    calls = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(delta.site.base, name).register_forward_hook(
            lambda m, args, out, name=name: calls.setdefault(name, []).append(args[0].shape[0])
        )
    model.model.layers[0].mlp(torch.randn(2, 6, 32))
    assert calls == {"gate_proj": [12], "up_proj": [12], "down_proj": [12]}


def test_stacking_and_rows_add_what_each_adapter_changes():
    model, adapter, _ = make()
    second = plait.attach(model, "mixlora", name="b", rank=2, experts=3, seed=7)
    perturb(adapter)
    perturb(second)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 4, 32)
    plait.activate(model, {})
    y = mlp(x)
    changes = [naive(a.deltas[PATH], x).float() - y for a in (adapter, second)]
    plait.activate(model, {"default": 1.0, "b": 0.5})
    wanted = y + changes[0] + 0.5 * changes[1]
    torch.testing.assert_close(mlp(x), wanted, rtol=1e-4, atol=1e-5)
    with plait.per_row(model, ["b", None, "default"]):
        rows = torch.stack([y[0] + changes[1][0], y[1], y[2] + changes[0][2]])
        torch.testing.assert_close(mlp(x), rows, rtol=1e-4, atol=1e-5)


def test_count():
    model, adapter, _ = make()
    d, m, r, N = 32, 48, 3, 5
    blocks = 2 * N * (3 * r * (d + m) + d)
    attention = 2 * r * ((32 + 32) + 2 * (32 + 16) + (32 + 32))
    sites = [x.site for x in adapter.deltas.values()]
    assert adapter.num_parameters() == blocks + attention
    assert adapter.method.count(sites, adapter.options) == blocks + attention
    plait.detach(model)
    bare = [x.site for x in adapter.deltas.values()]
    assert adapter.method.count(bare, adapter.options) == blocks + attention


def test_dropout_and_jitter_act_in_training_only():
    for options in ({"dropout": 0.5}, {"jitter": 0.9}):
        model, adapter, _ = make(**options)
        perturb(adapter)
        mlp, x = model.model.layers[0].mlp, torch.randn(2, 6, 32)
        model.eval()
        assert torch.equal(mlp(x), mlp(x))
        model.train()
        assert not torch.equal(mlp(x), mlp(x))


def test_checkpointing_neither_counts_twice_nor_changes_gradients():
    model, adapter, _ = make(jitter=0.1, dropout=0.1)
    perturb(adapter, 0.1)
    model.train()
    grads, losses = [], []
    for _ in range(2):
        torch.manual_seed(5)
        loss = model(tokens(), labels=tokens()).loss
        auxiliary = plait.auxiliary_loss(model)
        (loss + auxiliary).backward()
        losses.append(auxiliary.item())
        grads.append([p.grad.clone() for p in adapter.parameters()])
        for p in adapter.parameters():
            p.grad = None
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert losses[0] == pytest.approx(losses[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_copies_and_pickles_leave_the_last_graph_behind():
    model, adapter, _ = make()
    perturb(adapter)
    wanted = model(tokens()).logits
    plait.auxiliary_loss(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(tokens()).logits, wanted)
        assert plait.auxiliary_loss(twin).item() > 0


def test_impossible_options_are_refused():
    for options, message in [
        ({"top_k": 6}, "top_k"),
        ({"strategy": "best"}, "strategy"),
        ({"top_p": 0.0}, "top_p"),
    ]:
        with pytest.raises(PlaitError, match=message):
            make(**options)


def test_a_mixture_can_be_neither_fused_nor_exported():
    model, adapter, _ = make()
    with pytest.raises(PlaitError, match="not linear"):
        plait.fuse(model)
    with pytest.raises(PlaitError, match="not linear"):
        adapter.to_lora()


@pytest.mark.parametrize("options", [{}, {"strategy": "top-p"}])
def test_loss_falls_on_a_tiny_llama(options):
    assert_loss_falls("mixlora", rank=4, experts=4, **options)
