"""Flexora: gates and their gradients against autograd, and what becomes of the blocks left out."""

from __future__ import annotations

import copy

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import Tensor
from torch.func import functional_call

import plait
from plait import kernels
from plait.rules.flexora import Flexora
from plait.testing import RuleCase

DEPTH = 4
SITES = r"layers\.\d\.(up|down)"


def stacked(rule: Flexora, steps: int = 8, lr: float = 1e-2, seed: int = 0, **more):
    model = make_stack(depth=DEPTH)
    adapter = plait.attach(model, "lora", rank=3, alpha=6, targets=SITES, seed=seed)
    run = plait.RuleStack(
        model, [rule], lr=lr, total_steps=steps, seed=5, validation=batches(9)[-3:], **more
    )
    return model, adapter, run


def loss_at(model, alpha: Tensor, ids: Tensor, theta: dict[str, Tensor] | None = None) -> Tensor:
    """The loss with each block's change multiplied by N softmax(alpha)_l, on the dense weights."""
    a = DEPTH * alpha.softmax(0)
    weights = {}
    adapter = plait.adapters(model)["default"]
    for path, delta in adapter.deltas.items():
        A, B = delta.A, delta.B
        if theta is not None:
            A, B = theta[f"{path}.A"], theta[f"{path}.B"]
        block = int(path.split(".")[1])
        weights[path] = delta.site.base.weight + a[block] * delta.scaling * B @ A
    bare = getattr(model, "_oracle", None)
    if bare is None:
        bare = make_stack(depth=DEPTH)
        object.__setattr__(model, "_oracle", bare)
    named = {**dict(bare.named_parameters()), **{f"{p}.weight": w for p, w in weights.items()}}
    return functional_call(bare, named, (ids,))


def test_at_alpha_zero_the_forward_is_plain_lora_bit_for_bit_and_gates_sum() -> None:
    model, adapter, run = stacked(Flexora())
    randomise(adapter)
    (rule,) = run.rules
    (ids,) = batches(1)
    plain = model(ids)
    rule._gates.set(rule.gates().unbind())
    assert torch.equal(model(ids), plain)
    rule.alpha.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64))
    torch.testing.assert_close(rule.gates().sum(), torch.tensor(4.0, dtype=torch.float64))
    rule._gates.set(rule.gates().unbind())
    torch.testing.assert_close(model(ids), loss_at(model, rule.alpha, ids))


def test_the_direct_gradient_is_autograds_and_sums_to_zero() -> None:
    model, adapter, run = stacked(Flexora(batches=2))
    randomise(adapter)
    (rule,) = run.rules
    rule.alpha.copy_(torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64))
    found = rule.hypergradient()
    assert all(p.grad is None and p.requires_grad for p in adapter.parameters())
    alpha = rule.alpha.clone().requires_grad_()
    held_out = batches(9)[-3:]
    (loss_at(model, alpha, held_out[0]) + loss_at(model, alpha, held_out[1])).div(2).backward()
    torch.testing.assert_close(found, alpha.grad, atol=1e-12, rtol=1e-9)
    assert float(found.sum().abs()) < 1e-12


def second_order(model, alpha: Tensor, training: list[list[Tensor]], val: Tensor, eta: float):
    """d L_val(theta_K(alpha), alpha) / d alpha on dense weights, by nothing but autograd."""
    adapter = plait.adapters(model)["default"]
    theta = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    alpha = alpha.clone().requires_grad_()
    for step in training:
        loss = sum(loss_at(model, alpha, ids, theta) for ids in step) / len(step)
        slope = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: t - eta * g for (n, t), g in zip(theta.items(), slope, strict=True)}
    return torch.autograd.grad(loss_at(model, alpha, val, theta), alpha)[0]


@pytest.mark.parametrize(
    ("kind", "steps", "tolerance"), [("unroll1", 1, 1e-3), ("unrollK", 3, 1e-9)]
)
def test_unrolled_gradients_match_full_second_order(kind, steps, tolerance) -> None:
    rule = Flexora(hypergrad=kind, unroll=3, batches=1, inner_lr=0.3)
    model, adapter, run = stacked(rule)
    randomise(adapter)
    rule.alpha.copy_(torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64))
    rule._gates.set(rule.gates().unbind())
    data = batches(6)
    training = [data[2 * i : 2 * i + 2] for i in range(3)]
    for step in training:
        rule._recent.advance()
        for ids in step:
            model(ids), run.extra_loss()
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    found = rule.hypergradient()
    want = second_order(model, rule.alpha, training[-steps:], batches(9)[-3], 0.3)
    plain = second_order(model, rule.alpha, [], batches(9)[-3], 0.3)
    assert (found - want).norm() <= tolerance * want.norm()
    assert (plain - want).norm() > 20 * tolerance * want.norm()  # the second term matters here
    for name, p in adapter.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad


def test_one_unrolled_step_is_what_finite_differences_approach() -> None:
    found = {}
    for kind in ("unroll1", "unrollK"):
        rule = Flexora(hypergrad=kind, unroll=1, batches=2, inner_lr=0.1)
        model, adapter, run = stacked(rule)
        randomise(adapter)
        model(batches(1)[0]), run.extra_loss()
        found[kind] = rule.hypergradient()
    gap = (found["unroll1"] - found["unrollK"]).norm()
    assert gap < 1e-3 * found["unrollK"].norm()


def test_alpha_learns_by_adam_while_the_factors_train_behind_the_gates() -> None:
    rule = Flexora(batches=1, search=5, restart=False)
    model, _, run = stacked(rule, steps=9)
    alpha = torch.zeros(DEPTH, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=0.01)
    held_out = batches(9)[-3:]
    for step, ids in enumerate(batches(4), 1):
        train(model, run, [ids])
        alpha.grad = None
        loss_at(model, alpha, held_out[step % 3]).backward()
        adam.step()
        torch.testing.assert_close(rule.alpha, alpha.detach(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(
            model(ids).detach(), loss_at(model, alpha, ids).detach(), atol=1e-12, rtol=1e-12
        )


@pytest.mark.parametrize("restart", [True, False])
def test_blocks_left_out_stay_frozen_and_the_others_restart(restart: bool) -> None:
    rule = Flexora(search=4, batches=1, keep=2, restart=restart)
    model, adapter, run = stacked(rule, steps=8)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    train(model, run, batches(4))
    chosen = rule.selected()
    inside = {n for n in start if int(n.split(".")[1]) in chosen}
    assert len(chosen) == 2 and len(inside) == len(start) // 2
    for name, p in adapter.named_parameters():
        back = restart or name not in inside
        assert torch.equal(p, start[name]) == back, name
        assert p.requires_grad == (name in inside)
        assert (p in run.optimizer.state) == (not back)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert trained == adapter.num_parameters() // 2
    train(model, run, batches(8)[4:])
    for name, p in adapter.named_parameters():
        assert torch.equal(p, start[name]) == (name not in inside), name
    (ids,) = batches(1)
    answer = model(ids)
    run.finish()
    torch.testing.assert_close(model(ids), answer)
    assert {int(path.split(".")[1]) for path in adapter.deltas} == set(chosen)
    assert adapter.num_parameters() == sum(start[n].numel() for n in inside)
    assert not any(
        type(m).__name__.startswith("Adapted")
        for i in {*range(DEPTH)} - {*chosen}
        for m in model.layers[i].modules()
    )
    assert all(p.requires_grad for p in adapter.parameters())


def test_stage_two_is_plain_lora_on_the_chosen_blocks() -> None:
    rule = Flexora(search=2, batches=1, keep=2)
    model, adapter, run = stacked(rule, steps=6)
    train(model, run, batches(6))
    run.finish()
    other = make_stack(depth=DEPTH)
    path = "|".join(map(str, rule.selected()))
    alone = plait.attach(
        other, "lora", rank=3, alpha=6, targets=rf"layers\.({path})\.(up|down)", seed=0
    )
    train(other, plait.RuleStack(other, [], lr=1e-2), batches(6)[2:])
    assert list(alone.deltas) == list(adapter.deltas)
    for place, delta in alone.deltas.items():
        assert torch.equal(delta.A, adapter.deltas[place].A)
        assert torch.equal(delta.B, adapter.deltas[place].B)


def planted(seed: int):
    """Blocks 1 and 2 of a teacher are moved; the training labels of a batch tell nothing more."""
    teacher = make_stack(depth=DEPTH)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in (1, 2):
            for layer in (teacher.layers[block].up, teacher.layers[block].down):
                shape = layer.weight.shape
                low = torch.randn(shape[0], 2, generator=g, dtype=torch.float64)
                layer.weight += (
                    0.5 * low @ torch.randn(2, shape[1], generator=g, dtype=torch.float64)
                )
    return teacher


class Student(torch.nn.Module):
    """Mean squared distance of the stack's last hidden state to given ones."""

    def __init__(self, stack) -> None:
        super().__init__()
        self.layers, self.embed = stack.layers, stack.embed

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return (self.hidden(ids) - target).square().mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_block_that_overfits_is_left_out(seed: int) -> None:
    """Block 3's adapter holds noise that only hurts on held-out data; 1 and 2 hold the truth."""
    teacher = Student(planted(seed))
    model = Student(make_stack(depth=DEPTH))
    adapter = plait.attach(model, "lora", rank=2, alpha=2, targets=SITES, seed=0)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            block, place = int(path.split(".")[1]), path.split("layers.")[1]
            if block in (1, 2):  # the teacher's own change, at half its size
                change = teacher.get_submodule(path).weight - delta.site.base.weight
                U, S, V = torch.linalg.svd(change)
                delta.B.copy_(0.5 * U[:, :2] * S[:2]), delta.A.copy_(V[:2])
            elif block == 3:
                delta.B.copy_(torch.randn(delta.B.shape, generator=g) * 0.5)
            assert place
    data = batches(6)
    with torch.no_grad():
        pairs = [(ids, teacher.hidden(ids)) for ids in data]
    rule = Flexora(search=20, batches=2, keep=2)
    run = plait.RuleStack(model, [rule], lr=0.0, total_steps=40, validation=pairs[:3])
    for step in range(20):
        (model(*pairs[3 + step % 3]) + run.extra_loss()).backward()
        run.step()
    assert rule.selected() == [1, 2]
    assert float(rule.alpha[3]) == min(rule.alpha.tolist())


def test_blocks_of_one_function_have_one_gradient() -> None:
    """Blocks 1 and 2 change places, with their factors and their alphas."""
    found = []
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        model, adapter, run = stacked(Flexora(batches=2))
        (rule,) = run.rules
        for path, delta in adapter.deltas.items():
            block = order[int(path.split(".")[1])]
            g = torch.Generator().manual_seed(100 * block + len(path.split(".")[-1]))
            with torch.no_grad():
                delta.A.copy_(0.3 * torch.randn(delta.A.shape, generator=g))
                delta.B.copy_(0.3 * torch.randn(delta.B.shape, generator=g))
        # Both blocks read the same stream, so that their order does not matter.
        first, second = model.layers[1], model.layers[2]
        with torch.no_grad():
            second.up.weight.copy_(first.up.weight), second.up.bias.copy_(first.up.bias)
            second.down.weight.copy_(first.down.weight), second.down.bias.copy_(first.down.bias)
        run.run.validation = batches(2)
        embed = model.embed

        def forward(ids, model=model, embed=embed):
            x = embed(ids)
            x = model.layers[0](x)
            x = model.layers[1](x) + model.layers[2](x) - x
            logits = model.head(model.norm(model.layers[3](x)))[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        model.forward = forward
        found.append(rule.hypergradient()[order])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-9)
    assert float((found[0][1] - found[0][2]).abs()) > 1e-6


@pytest.mark.parametrize("kind", ["direct", "unroll1", "unrollK"])
@pytest.mark.parametrize("half", [2, 6])
def test_resuming_gives_the_same_trajectory(kind: str, half: int) -> None:
    rule = lambda: Flexora(search=4, batches=1, hypergrad=kind)  # noqa: E731
    model, adapter, run = stacked(rule())
    train(model, run, batches(8))
    first, early, run = stacked(rule())
    train(first, run, batches(8)[:half])
    saved = copy.deepcopy([early.state_dict(), run.optimizer.state_dict(), run.state_dict()])
    second, late, run = stacked(rule())
    late.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(second, run, batches(8)[half:])
    for key, value in adapter.state_dict().items():
        assert torch.equal(late.state_dict()[key], value), key


def test_a_held_back_start_goes_with_its_site() -> None:
    model = make_stack(depth=DEPTH)
    plait.attach(model, "lora", initializer="pissa", rank=2, targets=SITES, seed=0)
    bare = make_stack(depth=DEPTH)
    rule = Flexora(search=1, batches=1, keep=1)
    run = plait.RuleStack(model, [rule], lr=1e-2, total_steps=2, validation=batches(1))
    train(model, run, batches(1))
    run.finish()
    x = torch.randn(5, 6, dtype=torch.float64)
    for i in range(DEPTH):
        same = torch.allclose(model.layers[i](x), bare.layers[i](x), atol=1e-12)
        assert same or i in rule.selected()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vera", {"rank": 2}),  # shares tensors: its sites stay
        ("kasa", {"rank": 2}),  # does not start at the base
        ("bone", {"rank": 2}),  # no pair
    ],
)
def test_any_method_is_left_out_of_a_block_so_that_the_base_answers_there(method, options) -> None:
    model, bare = make_stack(depth=DEPTH), make_stack(depth=DEPTH)
    adapter = plait.attach(model, method, targets=SITES, seed=0, **options)
    rule = Flexora(search=2, batches=1, keep=1)
    run = plait.RuleStack(model, [rule], lr=1e-2, total_steps=4, validation=batches(1))
    train(model, run, batches(4))
    run.finish()
    x = torch.randn(5, 6, dtype=torch.float64)
    for i in range(DEPTH):
        same = torch.allclose(model.layers[i](x), bare.layers[i](x), atol=1e-12)
        assert same == (i not in rule.selected())
    assert len(adapter.deltas) == (8 if method == "vera" else 2)


def test_routers_of_blocks_left_out_add_no_loss() -> None:
    case = RuleCase(plait.get_method("flexora"))
    model = case.model()
    plait.attach(model, "mixlora", seed=0, **plait.get_method("mixlora").example)
    rules = [Flexora(search=1, batches=1, keep=1)]
    run = plait.RuleStack(model, rules, lr=1e-2, total_steps=4, validation=case.batches(1))
    for batch in case.batches(3):
        (model(**batch).loss + run.extra_loss()).backward()
        run.step()
    run.finish()


def test_what_cannot_be_is_refused() -> None:
    model = make_stack(depth=DEPTH)
    plait.attach(model, "lora", rank=2, targets=SITES)
    with pytest.raises(plait.PlaitError, match="validation="):
        plait.RuleStack(model, ["flexora"], total_steps=10)
    with pytest.raises(plait.PlaitError, match="search"):
        plait.RuleStack(model, [Flexora(search=10)], total_steps=10, validation=batches(1))
    with pytest.raises(plait.PlaitError, match="direct, unroll1, unrollK"):
        Flexora(hypergrad="second")
    shared = make_stack(depth=DEPTH)
    plait.attach(shared, "hypelora", rank=2, targets=SITES)
    with pytest.raises(plait.PlaitError, match="share tensors"):
        plait.RuleStack(shared, ["flexora"], total_steps=10, validation=batches(1))
    one = make_stack(depth=DEPTH)
    plait.attach(one, "lora", rank=2, targets=r"layers\.1\.(up|down)")
    with pytest.raises(plait.PlaitError, match="1 transformer blocks"):
        plait.RuleStack(one, ["flexora"], total_steps=10, validation=batches(1))


def test_unrolling_leaves_the_kernels_and_modes_as_they_were() -> None:
    rule = Flexora(hypergrad="unrollK", unroll=2, batches=1)
    model, _, run = stacked(rule)
    model.train()
    model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    train(model, run, batches(2))
    assert [m.training for m in model.modules()] == modes
    assert not kernels._gate._reference.get()
