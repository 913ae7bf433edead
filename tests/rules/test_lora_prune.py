"""LoRAPrune: the estimate, the schedule, the masks, and the model cut by what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.compression.pruning import LoraGradient, Taylor, prune
from plait.errors import PlaitError
from plait.rules._lora_gradient import entry_importance, estimated_gradient
from plait.rules.lora_prune import LoraPrune
from tiny import batch, llama

STEPS = 40


def trained(rule: LoraPrune, steps: int = STEPS, depth: int = 3, **more):
    model = llama(num_hidden_layers=depth)
    adapter = plait.attach(model, "lora", rank=4, seed=1)
    run = plait.RuleStack(model, [rule], lr=5e-3, total_steps=steps, **more)
    off = []
    for step in range(steps):
        model(**batch(rows=8, seed=step)).loss.backward()
        run.step()
        off.append({n: int((~m).sum()) for n, m in rule.kept.items()})
    return model, adapter, run, off


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch(seed=77)["input_ids"]).logits


def test_the_estimate_is_a_step_of_gradient_descent_with_rate_one() -> None:
    A, B = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    g_A, g_B = torch.randn_like(A), torch.randn_like(B)
    moved = B @ A - (B - g_B) @ (A - g_A)
    torch.testing.assert_close(estimated_gradient(A, B, g_A, g_B), moved)


def test_entries_are_weighed_with_the_weight_as_it_is() -> None:
    model = llama()
    adapter = plait.attach(model, "lora", rank=2, alpha=6)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    model(**batch()).loss.backward()
    pair = adapter.pairs()[0]
    W = pair.delta.site.weight().double() + 3 * pair.B.double() @ pair.A.double()
    a, b, ga, gb = (t.double() for t in (pair.A, pair.B, pair.A.grad, pair.B.grad))
    expected = ((gb @ a + b @ ga - gb @ ga) * W) ** 2
    torch.testing.assert_close(entry_importance(pair).double(), expected.detach(), rtol=1e-3,
                               atol=1e-3 * float(expected.max()))  # fmt: skip


def test_the_schedule_is_cubic_and_the_masks_follow_it() -> None:
    rule = LoraPrune(ratio=0.5, interval=3, first=0)
    *_, off = trained(rule)
    begin, end = 4, 36
    for t in range(1, STEPS + 1):
        if t <= begin:
            expected = 0.0
        elif t >= end:
            expected = 0.5
        else:
            expected = 0.5 - 0.5 * (1 - (t - begin) / (end - begin)) ** 3
        assert rule.share(t) == pytest.approx(expected)
    assert set(off[0]) == {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn", "mlp")}
    for name, size in (("model.layers.0.mlp", 48), ("model.layers.1.self_attn", 2)):
        counts = [step[name] for step in off]
        assert counts == sorted(counts)  # what is off stays off
        for t in range(1, STEPS + 1):
            pruned = [s for s in range(1, t + 1) if s == end or (begin < s < end and s % 3 == 0)]
            last = max(pruned, default=0)
            assert counts[t - 1] == (int(size * rule.share(last)) if last else 0)
        assert counts[-1] == size // 2


def test_what_is_off_is_zero_where_it_is_read_and_gets_no_gradient() -> None:
    rule = LoraPrune(ratio=0.5, interval=1, first=0)
    model, adapter, _run, _off = trained(rule, steps=10)
    kept = rule.kept["model.layers.0.mlp"]
    seen: list[Tensor] = []
    mlp = model.model.layers[0].mlp
    handle = mlp.down_proj.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(**batch()).loss.backward()
    handle.remove()
    assert not seen[0][..., ~kept].any() and seen[0][..., kept].any()
    for name in ("gate_proj", "up_proj"):
        grad = adapter.deltas[f"model.layers.0.mlp.{name}"].B.grad
        assert not grad[~kept].any() and grad[kept].any()
    heads = rule.kept["model.layers.0.self_attn"].repeat_interleave(16)  # two queries of width 8
    grad = adapter.deltas["model.layers.0.self_attn.q_proj"].B.grad
    assert not grad[~heads].any() and grad[heads].any()
    before = logits(model)
    with torch.no_grad():
        adapter.deltas["model.layers.0.mlp.up_proj"].B[~kept] += 5
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_model_is_cut_by_what_training_left(method: str, tmp_path) -> None:
    model = llama(num_hidden_layers=3)
    adapter = plait.attach(model, method, rank=4, seed=1)
    rule = LoraPrune(ratio=0.5, interval=2, last=0)
    run = plait.RuleStack(model, [rule], lr=5e-3, total_steps=12)
    for step in range(12):
        model(**batch(rows=8, seed=step)).loss.backward()
        run.step()
    masked = logits(model.eval())
    run.finish()
    assert not torch.allclose(logits(model), masked)  # the masks are off
    adapter.save(tmp_path / "adapter")
    fresh = llama(num_hidden_layers=3)
    again = plait.load(fresh, tmp_path / "adapter", "a")
    result = prune(fresh, keep=again.info["lora-prune"]["kept"])
    torch.testing.assert_close(logits(fresh), masked, rtol=1e-4, atol=1e-4)
    assert result.config == {
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    plait.fuse(fresh)
    torch.testing.assert_close(logits(fresh), masked, rtol=1e-4, atol=1e-4)


def test_scores_take_little_notice_of_the_losss_scale() -> None:
    """Each layer counts in proportion; only g_B g_A, of second order in a step, knows the scale."""
    scores = []
    for scale in (1.0, 10.0):
        model = llama()
        adapter = plait.attach(model, "lora", rank=4, seed=1)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        rule = LoraPrune(first=0, last=0)
        run = plait.RuleStack(model, [rule], lr=0.0, total_steps=20)
        (1e-3 * scale * model(**batch()).loss).backward()
        run.before_step()
        scores.append(rule.scores)
        run.finish()
    for name, one in scores[0].items():
        assert float(torch.corrcoef(torch.stack([one, scores[1][name]]))[0, 1]) > 0.99


def test_the_estimate_points_where_the_true_gradient_does() -> None:
    model = llama()
    adapter = plait.attach(model, "lora", rank=8, seed=1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    for step in range(30):
        model(**batch(rows=16, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    from plait.structure import find_structure

    groups = [g for g in find_structure(model).groups.values() if g.whole and g.inner]
    data = [batch(rows=16, seed=500)]
    estimate = LoraGradient().scores(model, groups, data, None)
    exact = Taylor(order="second").scores(model, groups, data, None)
    for group in groups:
        if group.size > 8:
            both = torch.stack([estimate[group.name], exact[group.name]])
            ranks = both.argsort(1).argsort(1).double()
            assert float(torch.corrcoef(ranks)[0, 1]) > 0.3, group.name


class ByChance(LoraPrune):
    """The same schedule with scores drawn once."""

    def before_step(self) -> None:
        draw = torch.Generator().manual_seed(self.run.seed)
        self.scores = {g.name: torch.rand(g.size, generator=draw).double() for g in self.groups}


@pytest.mark.slow
def test_what_loras_gradients_say_beats_chance() -> None:
    base = llama(num_hidden_layers=2)
    optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3)
    for step in range(120):
        base(**batch(rows=16, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss_after(rule: LoraPrune, seed: int) -> float:
        model = copy.deepcopy(base)
        plait.attach(model, "lora", rank=4, seed=1)
        run = plait.RuleStack(model, [rule], lr=1e-3, total_steps=30, seed=seed)
        for step in range(30):
            model(**batch(rows=8, seed=step)).loss.backward()
            run.step()
        run.finish()
        prune(model, keep=plait.adapters(model)["default"].info["lora-prune"]["kept"])
        with torch.no_grad():
            return float(model.eval()(**batch(rows=64, seed=999)).loss)

    settings = {"ratio": 0.5, "interval": 2, "last": 0}
    ours = loss_after(LoraPrune(**settings), 0)
    assert ours < min(loss_after(ByChance(**settings), seed) for seed in range(3))


def test_what_cannot_be_pruned_is_refused() -> None:
    model = llama()
    plait.attach(model, "lora", rank=2)
    with pytest.raises(PlaitError, match="total_steps"):
        plait.RuleStack(model, [LoraPrune()])
    with pytest.raises(PlaitError, match="leave no step"):
        plait.RuleStack(model, [LoraPrune(warmup=0.6, cooldown=0.5)], total_steps=20)
    with pytest.raises(PlaitError, match="no head or channel"):
        plait.RuleStack(model, [LoraPrune(last=2)], total_steps=20)
    with pytest.raises(PlaitError, match="start <= ratio"):
        LoraPrune(start=0.6)
