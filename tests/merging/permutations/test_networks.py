"""PLeaS on whole networks: permutations, partial merges, fits and budgets."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import accuracy, batches, held_out, mlp, trained
from torch import Tensor, nn

from plait.errors import PlaitError, UnknownNameError
from plait.merging.permutations import (
    Group,
    Slot,
    budget_ratios,
    chain_groups,
    check_groups,
    find_groups,
    joint_moments,
    least_squares,
    match,
    merge_networks,
    partial_merge,
    permute,
    refresh_batch_norms,
    split_units,
)
from plait.merging.permutations.budget import cost, cost_terms


def shuffled(groups: list[Group], seed: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.size, generator=g) for group in groups}


def same(a: nn.Module, b: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a(x), b(x), atol=tolerance, rtol=tolerance)


# -- groups -------------------------------------------------------------------------------------


def test_a_chain_s_groups_are_its_hidden_layers() -> None:
    first, second = find_groups(mlp(0, 16))
    assert first == Group(
        "0", 16, (Slot("0.weight", 0), Slot("0.bias", 0), Slot("2.weight", 1, reads=True))
    )
    assert (second.name, second.size) == ("2", 16)
    check_groups(mlp(0, 16), [first, second], lambda m: m(held_out()[0]))
    named = nn.Module()
    named.a, named.b = nn.Linear(3, 4), nn.Linear(4, 2)
    (only,) = chain_groups(named, ["a", "b"])
    assert [s.tensor for s in only.slots] == ["a.weight", "a.bias", "b.weight"]


def test_a_group_that_lacks_a_tensor_is_found_out() -> None:
    broken = Group("half", 16, (Slot("0.weight", 0), Slot("2.weight", 1, reads=True)))
    with pytest.raises(PlaitError, match="units of group 'half' changes the network"):
        check_groups(mlp(0, 16), [broken], lambda m: m(held_out()[0]))
    with pytest.raises(PlaitError, match=r"axis 0 of '0\.weight' is 16"):
        permute(mlp(0, 16), [Group("wide", 17, (Slot("0.weight", 0),))], {})
    with pytest.raises(PlaitError, match=r"Softmax\) is not known"):
        find_groups(nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1), nn.Linear(3, 2)))
    with pytest.raises(PlaitError, match="no hidden units are known"):
        find_groups(nn.Linear(2, 3))


def convolutional(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2)),
        *(nn.PReLU(4), nn.Flatten(), nn.Linear(16, 12), nn.LayerNorm(12), nn.GELU()),
        nn.Linear(12, 3),
    )
    made(torch.randn(50, 1, 8, 8) * 2 + 1)  # batch norms get statistics
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return made.eval()


def test_convolutions_norms_and_flattened_channels_move_along() -> None:
    model, x = convolutional(0), torch.randn(7, 1, 8, 8)
    groups = find_groups(model)
    assert [(g.name, g.size, g.widens) for g in groups] == [
        ("0", 6, True),
        ("4", 4, True),
        ("7", 12, False),
    ]
    order = shuffled(groups)
    twin = permute(model, groups, order)
    assert not torch.equal(twin[0].weight, model[0].weight)
    same(model, twin, x)
    found = match(twin, model, groups)
    assert all(torch.equal(found.order[name], order[name]) for name in order)
    same(partial_merge(twin, model, groups, split_units(groups, found, 0.0)), model, x)


# -- matching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_permuted_copy_is_recovered_exactly_and_merged_to_itself(by: str) -> None:
    model = trained()[0]
    groups = find_groups(model)
    order = shuffled(groups)
    twin = permute(model, groups, order)
    same(model, twin, held_out()[0])
    moments = joint_moments(twin, model, batches())
    found = match(twin, model, groups, by, moments)
    alive = {"0": slice(None), "2": slice(None)}
    if by == "activations":  # units that never fire are alike to all others
        alive = {g.name: found.cosine[g.name] > 0.5 for g in groups}
        assert all(int(a.sum()) > 64 for a in alive.values())
    for name, units in alive.items():
        assert torch.equal(found.order[name][units], order[name][units])
    splits = split_units(groups, found, 0.0)
    merged = partial_merge(twin, model, groups, splits)
    x = held_out()[0] if by == "weights" else batches()[0]["input"]
    same(merged, model, x)
    same(least_squares(merged, twin, model, groups, splits, moments), model, x, 1e-4)


def test_the_assignment_by_weights_is_a_local_optimum() -> None:
    one, two = trained()
    groups = find_groups(one)
    found = match(one, two, groups)
    assert 1 < found.sweeps < 100

    def inner(order: dict[str, Tensor]) -> float:
        turned = dict(permute(two, groups, order).named_parameters())
        return sum(
            float((p * turned[n]).sum().detach())
            for n, p in one.named_parameters()
            if n != "4.bias"
        )

    best = inner(found.order)
    assert best > inner({}) and best > inner(shuffled(groups))
    g = torch.Generator().manual_seed(0)
    for _ in range(60):  # exchanging two units never helps
        name = ["0", "2"][int(torch.randint(2, (), generator=g))]
        i, j = torch.randint(128, (2,), generator=g).tolist()
        other = {n: o.clone() for n, o in found.order.items()}
        other[name][[i, j]] = found.order[name][[j, i]]
        assert inner(other) <= best + 1e-4


# -- partial merging ----------------------------------------------------------------------------


def test_at_ratio_one_both_networks_run_side_by_side() -> None:
    one, two = trained()
    groups = find_groups(one)
    splits = split_units(groups, match(one, two, groups), 1.0)
    x = held_out()[0]
    for weights in ((0.5, 0.5), (0.8, 0.2)):
        merged = partial_merge(one, two, groups, splits, weights)
        with torch.no_grad():
            wanted = weights[0] * one(x) + weights[1] * two(x)
            torch.testing.assert_close(merged(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_widths_and_empty_blocks_stay_what_they_are_also_after_the_fit(ratio: float) -> None:
    one, two = trained()
    found = merge_networks(one, two, batches(), ratios=ratio)
    width = 128 + round(ratio * 128)
    first, middle, last = (found.model[i] for i in (0, 2, 4))
    assert (first.out_features, middle.in_features, middle.out_features) == (width,) * 3
    assert middle.weight.shape == (width, width) and last.weight.shape == (10, width)
    merged = 128 - round(ratio * 128)
    a, b = slice(merged, 128), slice(128, width)
    assert not middle.weight[a, b].any() and not middle.weight[b, a].any()
    assert ratio in (0.0,) or bool(middle.weight[a, a].any() and middle.weight[b, b].any())
    terms = cost_terms(one, found.groups)
    counted = sum(int((m.weight != 0).sum()) for m in (first, middle, last))
    blocks = sum(m.weight.numel() for m in (first, middle, last)) - 2 * (128 - merged) ** 2
    assert found.cost * sum(n for n, _, _ in terms) == pytest.approx(blocks, rel=1e-9)
    assert counted <= blocks


def test_a_network_merged_with_itself_is_itself_at_any_ratio() -> None:
    model, x = convolutional(2), torch.randn(5, 1, 8, 8)
    groups = find_groups(model)
    found = match(model, model, groups)
    for ratio in (0.0, 0.4, 1.0):
        same(partial_merge(model, model, groups, split_units(groups, found, ratio)), model, x)
    with pytest.raises(PlaitError, match="'7' cannot be widened"):
        split_units(groups, found, {"7": 0.5})
    with pytest.raises(UnknownNameError, match="unknown group"):
        split_units(groups, found, {"8": 0.5})


# -- the fit ------------------------------------------------------------------------------------


def stacked(splits, name: str | None, X1: Tensor, X2: Tensor, targets: str) -> Tensor:
    """What a layer reads (or should give) in the merged order, straight from both networks'."""
    if name is None:
        p = q = torch.arange(X1.shape[1])
        s1 = s2 = torch.arange(0)
    else:
        split = splits[name]
        (p, q), (s1, s2) = split.pairs.T, split.alone
    if targets == "average":
        return torch.cat([(X1[:, p] + X2[:, q]) / 2, X1[:, s1], X2[:, s2]], 1)
    none1, none2 = X1.new_zeros(len(X1), len(s2)), X2.new_zeros(len(X2), len(s1))
    rows1 = torch.cat([X1[:, p], X1[:, s1], none1], 1)
    rows2 = torch.cat([X2[:, q], none2, X2[:, s2]], 1)
    return torch.cat([rows1, rows2])


def layer_data(one, two, splits, at: int, targets: str) -> tuple[Tensor, Tensor]:
    """X and Y of layer `at` of the digits networks, in float64."""
    x = torch.cat([b["input"] for b in batches()]).double()
    sides = []
    with torch.no_grad():
        for model in (one, two):
            wide = copy.deepcopy(model).double()
            sides.append((wide[:at](x), wide[: at + 1](x)))
    (X1, Y1), (X2, Y2) = sides
    inside, outside = {0: (None, "0"), 2: ("0", "2"), 4: ("2", None)}[at]
    return (
        stacked(splits, inside, X1, X2, targets),
        stacked(splits, outside, Y1, Y2, targets),
    )


def layer_error(layer: nn.Linear, X: Tensor, Y: Tensor) -> float:
    W, b = layer.weight.detach().double(), layer.bias.detach().double()
    return float((X @ W.T + b - Y).square().mean())


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_the_fit_never_raises_a_layer_s_error(ratio: float, ridge: float) -> None:
    one, two = trained()
    groups = find_groups(one)
    moments = joint_moments(one, two, batches())
    splits = split_units(groups, match(one, two, groups), ratio)
    plain = partial_merge(one, two, groups, splits)
    fitted = least_squares(plain, one, two, groups, splits, moments, ridge=ridge)
    for at in (0, 2, 4):
        X, Y = layer_data(one, two, splits, at, "average")
        before, after = layer_error(plain[at], X, Y), layer_error(fitted[at], X, Y)
        assert after <= before * (1 + 1e-6) + 1e-10
        if at and ratio < 1 and ridge < 1:
            assert after < 0.8 * before


@pytest.mark.parametrize("targets", ["average", "separate"])
def test_the_closed_form_is_where_masked_gradient_descent_ends(targets: str) -> None:
    one, two, size = mlp(5, 20), mlp(6, 20), 20
    groups = find_groups(one)
    splits = split_units(groups, match(one, two, groups), 0.3)
    plain = partial_merge(one, two, groups, splits)
    moments = joint_moments(one, two, batches(), ["2"])
    ridge = 0.02
    fitted = least_squares(plain, one, two, groups, splits, moments, targets=targets, ridge=ridge)
    X, Y = layer_data(one, two, splits, 2, targets)
    Z, tokens = torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], 1), len(X)
    N, R = Z.T @ Z / tokens, Z.T @ Y / tokens  # either network's rows weigh a half where separate
    start = torch.cat([plain[2].weight, plain[2].bias[:, None]], 1).detach().double()
    merged, width = size - round(0.3 * size), len(start)
    a, b = slice(merged, size), slice(size, width)
    mask = torch.ones_like(start)
    mask[a, b], mask[b, a] = 0, 0
    pads = torch.zeros(width, 1, dtype=torch.float64)
    for rows in (slice(0, merged), a, b):
        allowed = mask[rows][0] > 0
        pads[rows] = ridge * N.diagonal()[allowed].mean()
    theta, ahead, step = start.clone(), start.clone(), 1 / (torch.linalg.eigvalsh(N)[-1] + pads)
    for i in range(3000):  # Nesterov's steps
        gradient = ahead @ N - R.T + pads * (ahead - start)
        last, theta = theta, ahead - step * gradient * mask
        ahead = theta + i / (i + 3) * (theta - last)
    found = torch.cat([fitted[2].weight, fitted[2].bias[:, None]], 1).detach().double()
    assert float((found - start).abs().max()) > 0.01
    torch.testing.assert_close(found, theta, atol=1e-4, rtol=1e-4)


def averaged(one: nn.Module, two: nn.Module) -> nn.Module:
    made = copy.deepcopy(one)
    with torch.no_grad():
        for p, q in zip(made.parameters(), two.parameters(), strict=True):
            p.copy_((p + q) / 2)
    return made


def test_networks_of_one_task_are_averaged_well_once_permuted_and_better_once_fitted() -> None:
    one, two = trained(apart=False)
    permuted = merge_networks(one, two, batches(), by="weights", fit=False)
    fitted = merge_networks(one, two, batches(), by="weights")
    scores = [accuracy(m) for m in (averaged(one, two), permuted.model, fitted.model)]
    assert scores[0] + 0.1 < scores[1] <= scores[2] + 0.005 and scores[2] > 0.95
    assert permuted.cost == fitted.cost == 1.0


def test_networks_of_different_tasks_need_the_fit() -> None:
    """Permuting alone is no better than averaging there; fitted they reach the wide ensemble."""
    one, two = trained()
    groups = find_groups(one)
    together = partial_merge(one, two, groups, split_units(groups, match(one, two, groups), 1.0))
    permuted, fitted = (merge_networks(one, two, batches(), fit=fit) for fit in (False, True))
    wide = merge_networks(one, two, batches(), budget=1.6, fit=False)
    scores = {
        "one": accuracy(one),
        "average": accuracy(averaged(one, two)),
        "permuted": accuracy(permuted.model),
        "wide": accuracy(wide.model),
    }
    best = accuracy(fitted.model)
    assert all(score + 0.05 < best for score in scores.values()), scores
    assert best > accuracy(together) - 0.03
    assert scores["wide"] > scores["permuted"] and 1.5 < wide.cost <= 1.6


# -- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.5, 1.9, 3.0])
def test_ratios_are_the_best_that_the_budget_allows(budget: float) -> None:
    model = mlp(0, 40)
    groups = find_groups(model)
    terms = cost_terms(model, groups)
    worth = {"0": 1.0, "2": 0.7}
    found = budget_ratios(model, groups, budget, worth=worth)
    assert cost(terms, found) <= budget + 1e-9
    assert all((r * 40) == pytest.approx(round(r * 40)) for r in found.values())
    steps = [i / 40 for i in range(41)]
    best = max(
        worth["0"] * a + worth["2"] * b
        for a in steps
        for b in steps
        if cost(terms, {"0": a, "2": b}) <= budget
    )
    gained = sum(worth[n] * r for n, r in found.items())
    assert gained >= best - 2 / 40, "but for rounding down to whole units"
    with pytest.raises(PlaitError, match="budget is at least 1"):
        budget_ratios(model, groups, 0.9)


def test_what_costs_are_is_what_the_merged_weights_hold() -> None:
    one, two = mlp(0, 20), mlp(1, 20)
    groups = find_groups(one)
    ratios = {"0": 0.25, "2": 0.5}
    merged = partial_merge(one, two, groups, split_units(groups, match(one, two, groups), ratios))
    filled = sum(int((m.weight != 0).sum()) for m in merged if isinstance(m, nn.Linear))
    whole = sum(m.weight.numel() for m in one if isinstance(m, nn.Linear))
    assert cost(cost_terms(one, groups), ratios) == pytest.approx(filled / whole)


# -- transformers -------------------------------------------------------------------------------


def llama(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=50,
        tie_word_embeddings=seed == 7,
    )
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data += 0.15 * torch.randn(p.shape)
    return model


def tokens(model: nn.Module) -> Tensor:
    ids = torch.arange(36).view(3, 12) % 50
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("seed", [0, 7])
def test_the_groups_of_a_transformer_may_be_reordered(seed: int) -> None:
    model = llama(seed)
    groups = find_groups(model, residual=True)
    assert sorted(g.size for g in groups) == [3, 3, 24, 40, 40]
    check_groups(model, groups, tokens)
    order = shuffled(groups)
    twin = permute(model, groups, order)
    found = match(twin, model, groups)
    assert all(torch.equal(found.order[n], order[n]) for n in order)
    merged = partial_merge(twin, model, groups, split_units(groups, found, 0.0))
    torch.testing.assert_close(tokens(merged), tokens(model), atol=1e-4, rtol=1e-4)


def test_a_transformer_is_widened_in_heads_and_hidden_units() -> None:
    model, other = llama(0), llama(1)
    groups = find_groups(model)
    found = match(model, model, groups)
    merged = partial_merge(model, model, groups, split_units(groups, found, 1.0))
    assert merged.model.layers[0].mlp.gate_proj.weight.shape == (80, 24)
    assert merged.model.layers[0].self_attn.k_proj.weight.shape == (24, 24)
    torch.testing.assert_close(tokens(merged), tokens(model), atol=1e-4, rtol=1e-4)
    data = [{"input_ids": torch.arange(36).view(3, 12) % 50}]
    fitted = merge_networks(model, other, data, groups=groups, ratios=0.35)
    assert torch.isfinite(tokens(fitted.model)).all()
    assert fitted.model.model.layers[1].mlp.down_proj.in_features == 54


def test_padding_does_not_count() -> None:
    model, other = llama(0), llama(1)
    ids = torch.arange(24).view(2, 12) % 50
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    layer = ["model.layers.1.mlp.down_proj"]
    found = joint_moments(model, other, [{"input_ids": ids, "attention_mask": mask}], layer)
    parts = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}]
    first, second = (joint_moments(model, other, [p], layer)[layer[0]] for p in parts)
    wanted = (12 * first + 6 * second) / 18
    torch.testing.assert_close(found[layer[0]], wanted, atol=1e-6, rtol=1e-5)


# -- norms and refusals -------------------------------------------------------------------------


def test_batch_norms_take_the_merged_network_s_own_statistics() -> None:
    one, two = convolutional(0), convolutional(1)
    data = [{"input": torch.randn(40, 1, 8, 8)} for _ in range(3)]
    groups = find_groups(one)
    splits = split_units(groups, match(one, two, groups), 0.5)
    merged = partial_merge(one, two, groups, splits)
    refresh_batch_norms(merged, data)
    x = torch.cat([d["input"] for d in data])
    with torch.no_grad():
        seen = merged[0](x)
    torch.testing.assert_close(merged[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    assert not merged.training and merged[1].momentum == 0.1 and merged[1].num_features == 9


def test_what_cannot_be_is_refused() -> None:
    one, two = mlp(0, 8), mlp(1, 8)
    groups = find_groups(one)
    with pytest.raises(PlaitError, match="need batches="):
        merge_networks(one, two, by="activations")
    with pytest.raises(PlaitError, match="no moments of a layer that reads"):
        match(one, two, groups, "activations")
    with pytest.raises(UnknownNameError, match="unknown matching"):
        match(one, two, groups, "outputs")
    with pytest.raises(PlaitError, match="add up to 1"):
        merge_networks(one, two, weights=(0.5, 0.6))
    with pytest.raises(PlaitError, match=r"axis 0 of '0\.weight' is 9"):
        merge_networks(one, mlp(1, 9))
    with pytest.raises(PlaitError, match="only one of them has a tensor"):
        merge_networks(one, nn.Sequential(*two, nn.Linear(10, 2)))
    import plait

    plait.attach(one, "lora", rank=2)
    with pytest.raises(PlaitError, match="has adapters"):
        merge_networks(one, two)
