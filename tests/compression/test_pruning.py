"""Pruning: the smaller model against the masked one, importance against autograd, files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.compression.pruning import (
    Importance,
    LoraGradient,
    Magnitude,
    Random,
    Taylor,
    load_pruned,
    prune,
)
from plait.errors import PlaitError
from plait.structure import Group, Masks, find_structure
from tiny_language_model import tiny_model

TOKENS = torch.arange(40).reshape(4, 10) * 7 % 258


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    drawn = [torch.randint(250, (2, 8), generator=draw) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def masked_answers(model: nn.Module, kept: dict[str, list[int]]) -> Tensor:
    """Of a whole model, with the other units' columns of what reads them set to 0."""
    twin = copy.deepcopy(model)
    structure = find_structure(twin)
    tensors = dict(twin.named_parameters())
    for name, units in kept.items():
        group = structure.groups[name]
        off = torch.ones(group.size, dtype=torch.bool).index_fill_(0, torch.tensor(units), False)
        for slot in group.slots:
            if slot.reads:
                tensors[slot.tensor].data.movedim(slot.dim, 0)[slot.spread(off)] = 0
    return answers(twin)


def encoder(kind: str = "bert") -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = BertModel(BertConfig(**sizes, num_attention_heads=4, vocab_size=258)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.25)
    return model


MODELS = {"llama": tiny_model, "gpt2": lambda: tiny_model("gpt2"), "bert": encoder}


@pytest.mark.parametrize("kind", MODELS)
def test_taking_units_out_is_switching_them_off(kind: str) -> None:
    model = MODELS[kind]()
    whole = copy.deepcopy(model)
    result = prune(model, ratio=0.5, importance="magnitude", loadable=False)
    assert len(result.kept) == 4 and result.model is model
    torch.testing.assert_close(answers(model), masked_answers(whole, result.kept))
    counted = sum(p.numel() for p in whole.parameters())
    structure = find_structure(whole)
    gone = sum(
        (group.size - len(result.kept[name]))
        * sum(
            whole.get_parameter(s.tensor).numel()
            // whole.get_parameter(s.tensor).shape[s.dim]
            * s.before
            * s.after
            for s in group.slots
        )
        for name, group in structure.groups.items()
        if name in result.kept
    )
    assert (result.before, result.after) == (counted, counted - gone)
    assert sum(p.numel() for p in model.parameters()) == counted - gone
    # A second cut starts from the smaller model.
    again = prune(model, ratio=0.5, importance="magnitude", loadable=False)
    assert again.before == result.after > again.after


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transformers_loads_what_its_configuration_can_say(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune(model, ratio=0.5, importance="magnitude")
    stays = [str(w.message) for w in caught if "stay whole" in str(w.message)]
    if kind == "llama":
        assert result.config == {
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        assert not stays
    else:  # BERT has no key for heads of their old width
        assert result.config == {"intermediate_size": 24}
        assert len(stays) == 1 and set(result.left_whole) == {
            f"encoder.layer.{i}.attention" for i in (0, 1)
        }
    result.save(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(answers(again), answers(model))
    assert torch.equal(answers(load_pruned(tmp_path / "small")), answers(model))
    assert not (tmp_path / "small" / "pruned.json").exists()
    with pytest.raises(PlaitError, match="exists already"):
        result.save(tmp_path / "small")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with pytest.warns(UserWarning, match="stay whole"):
        result = prune(model, ratio=0.25, importance="magnitude")
    assert result.config == {"n_inner": 96}
    assert model.lm_head.weight is model.transformer.wte.weight
    result.save(tmp_path / "small")
    assert torch.equal(
        answers(type(model).from_pretrained(tmp_path / "small").eval()), answers(model)
    )


def test_sizes_that_no_configuration_says_are_found_and_stored(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    result = prune(model, ratio=0.5, importance="magnitude", loadable=False)
    assert result.config is None
    assert result.attributes == {f"transformer.h.{i}.attn": {"split_size": 16} for i in (0, 1)}
    result.save(tmp_path / "small")
    again = load_pruned(tmp_path / "small")
    assert torch.equal(answers(again), answers(model))
    assert again.lm_head.weight is again.transformer.wte.weight
    note = (tmp_path / "small" / "pruned.json").read_text()
    (tmp_path / "small" / "pruned.json").write_text(note.replace('"split_size"', '"no_size"'))
    with pytest.raises(PlaitError, match="no_size"):
        load_pruned(tmp_path / "small")


def test_blocks_of_different_widths(tmp_path: Path) -> None:
    model = tiny_model()
    whole = copy.deepcopy(model)
    with pytest.raises(PlaitError, match="loadable=False"):
        prune(model, ratio=0.5, importance="magnitude", skip=[0])
    result = prune(model, ratio=0.5, importance="magnitude", skip=[0], loadable=False)
    assert set(result.kept) == {"model.layers.1.self_attn", "model.layers.1.mlp"}
    torch.testing.assert_close(answers(model), masked_answers(whole, result.kept))
    result.save(tmp_path / "small")
    assert torch.equal(answers(load_pruned(tmp_path / "small")), answers(model))
    fair = prune(copy.deepcopy(whole), ratio=0.5, importance="magnitude", scope="global",
                 loadable=False)  # fmt: skip
    structure = find_structure(whole)
    prunable = sum(
        whole.get_parameter(s.tensor).numel() for n in fair.kept for s in structure.groups[n].slots
    )
    assert 0.5 * prunable <= fair.before - fair.after < 0.5 * prunable + 5000
    assert len({len(units) for units in fair.kept.values()}) > 2


def test_the_width_of_the_stream() -> None:
    model = tiny_model()
    result = prune(model, ratio=0.25, importance="magnitude", mode="channel")
    assert result.config == {"hidden_size": 24}
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 24)
    assert model.model.norm.weight.shape == (24,) and model.lm_head.weight.shape == (258, 24)
    assert answers(model).shape == (4, 10, 258)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def squared(model: nn.Module, batch) -> Tensor:
    return model(batch["x"]).square().sum()


def test_a_plain_network(tmp_path: Path) -> None:
    """A sigmoid makes something of nothing: only the readers of a unit tell that it is off."""
    model, x = Mlp(), torch.randn(5, 6)
    data = [{"x": torch.randn(4, 6)} for _ in range(3)]
    whole = copy.deepcopy(model)
    result = prune(model, ratio=0.5, data=data, loss=squared)
    (first, last) = (torch.tensor(units) for units in result.kept.values())
    hidden = torch.sigmoid(whole.net[0](x))[:, first]
    hidden = F.gelu(hidden @ whole.net[2].weight[:, first].T + whole.net[2].bias)[:, last]
    expected = hidden @ whole.net[4].weight[:, last].T + whole.net[4].bias
    torch.testing.assert_close(model(x), expected)
    assert (model.net[0].out_features, model.net[2].in_features) == (6, 6)
    result.save(tmp_path / "small")
    torch.testing.assert_close(load_pruned(tmp_path / "small", Mlp())(x), model(x))


def test_convolutions_with_norms() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    ).eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net[1].running_mean.normal_()
    model, x = Net(), torch.randn(2, 3, 6, 6)
    plait.attach(model, "lora", name="a", rank=2, targets=["net.0", "net.4"])
    for parameter in plait.adapters(model)["a"].parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        before = model(x)
        result = prune(model, ratio=0.25, data=[{"x": x}], importance="magnitude")
        assert net[1].running_mean.shape == (6,) and net[4].weight.shape == (4, 96)
        assert not torch.allclose(model(x), before)  # compared with the masked model inside prune
    assert list(result.adapters) == ["a"]


def test_adapters_are_cut_with_the_model_and_answer_as_before() -> None:
    model = tiny_model()
    names = {"lora": {"rank": 3}, "dora": {"rank": 2}}
    for method, options in names.items():
        adapter = plait.attach(model, method, name=method, **options)
        for parameter in adapter.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    plait.activate(model, {"dora": 0.5, "lora": 1.0})
    structure = find_structure(model)
    kept = {"model.layers.0.mlp": [*range(5, 30)], "model.layers.1.self_attn": [1]}
    masks = {n: torch.zeros(structure.groups[n].size, dtype=torch.bool) for n in kept}
    for name, units in kept.items():
        masks[name][units] = True
    with Masks(model, structure, masks):
        expected = answers(model)
    result = prune(model, keep=kept)
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-4)
    assert set(result.adapters) == {"lora", "dora"}
    site = result.adapters["lora"].deltas["model.layers.0.mlp.down_proj"]
    assert site.A.shape == (3, 25) and all(p.requires_grad for p in site.parameters())
    plait.activate(model, {})
    base = answers(model)
    plait.activate(model, "lora")
    assert not torch.allclose(answers(model), base)


def test_a_model_that_cannot_be_cut_is_left_as_it_was() -> None:
    model = tiny_model()
    adapter = plait.attach(model, "lora", name="a", rank=2, train_modules=["down_proj"])
    before, tensors = answers(model), dict(model.named_parameters())
    with pytest.raises(PlaitError, match="holds a copy of"):
        prune(model, ratio=0.5, importance="magnitude")
    plait.detach(model)
    adapter = plait.attach(model, "lora", name="b", rank=2)

    class Stubborn(type(model)):
        def forward(self, *args, **kwargs):
            assert self.model.layers[0].mlp.up_proj.weight.shape[0] == 48
            return super().forward(*args, **kwargs)

    model.__class__ = Stubborn
    with pytest.raises((PlaitError, AssertionError)):
        prune(model, ratio=0.5, importance="magnitude", loadable=False)
    model.__class__ = Stubborn.__bases__[0]
    assert torch.equal(answers(model), before)
    assert plait.adapters(model) == {"b": adapter} and adapter.state.active == {"b": 1.0}
    assert all(model.get_parameter(n) is p for n, p in tensors.items() if "plait" not in n)
    assert model.config.intermediate_size == 48


# -- importance -----------------------------------------------------------------------------------


def reference(model: nn.Module, group: Group, data, order: str, level: str, aggregate: str):
    """Scores of a group in float64 from autograd's own gradients of the loss."""
    twin = copy.deepcopy(model).double()
    weights = {
        s.tensor: twin.get_parameter(s.tensor) for s in group.slots if not s.tensor.endswith("bias")
    }
    each = []
    for batch in data:
        twin.zero_grad()
        twin(**batch).loss.backward()
        each.append({n: w.grad.clone() for n, w in weights.items()})
    parts = []
    for slot in group.slots:
        if slot.tensor not in weights:
            continue
        w = weights[slot.tensor].detach()
        g = sum(e[slot.tensor] for e in each) / len(each)
        h = sum(e[slot.tensor] ** 2 for e in each) / len(each)
        value = {"first": w * g, "second": w**2 * h, "mixed": w * g - w**2 * h / 2}[order]
        rows = value.movedim(slot.dim, 0).reshape(value.shape[slot.dim], -1)
        rows = rows.sum(1).abs() if level == "vector" else rows.abs().sum(1)
        parts.append(rows.view(slot.before, group.size, slot.after).sum((0, 2)))
    stacked = torch.stack(parts)
    return {
        "sum": stacked.sum(0),
        "prod": stacked.prod(0),
        "max": stacked.max(0).values,
        "last": stacked[-1],
    }[aggregate]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("order", "level", "aggregate"),
    [
        ("first", "element", "sum"),
        ("first", "vector", "max"),
        ("second", "element", "prod"),
        ("mixed", "element", "sum"),
        ("mixed", "vector", "last"),
    ],
)
def test_taylor_scores_are_those_of_autograd(kind, order, level, aggregate) -> None:
    model, data = tiny_model(kind), batches(3)
    groups = [g for g in find_structure(model).groups.values() if g.whole]
    importance = Taylor(order=order, level=level, aggregate=aggregate)
    scores = importance.scores(model, groups, data, None)
    for group in groups:
        if not group.inner and kind == "gpt2":
            continue  # there the tied head's gradient is counted with the embedding's
        expected = reference(model, group, data, order, level, aggregate)
        near = 1e-5 * float(expected.max())  # sums in float32 that cancel
        torch.testing.assert_close(scores[group.name], expected, rtol=2e-4, atol=near)


def test_the_first_order_sees_a_small_step_of_the_loss() -> None:
    """|sum of w g| over a unit's inputs is the derivative of the loss by a gate on the unit."""
    model, data = tiny_model().double(), batches(1)
    group = find_structure(model).groups["model.layers.0.mlp"]
    (reader,) = group.readers

    def exact(model: nn.Module, batch) -> Tensor:  # transformers' own is in float32
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    scores = Taylor(order="first", level="vector", aggregate="last").scores(
        model, [group], data, exact
    )[group.name]
    weight = model.get_parameter(reader.tensor)
    for unit in (0, 17, 47):
        losses = []
        column = weight.data[:, unit].clone()
        for gate in (0.99, 1.01):  # norms and softmax are in float32
            weight.data[:, unit] = gate * column
            losses.append(float(exact(model, data[0]).detach()))
        weight.data[:, unit] = column
        slope = abs(losses[1] - losses[0]) / 0.02
        assert slope == pytest.approx(float(scores[unit]), rel=1e-2)


def test_a_unit_of_zeros_is_worth_nothing_and_goes_unnoticed() -> None:
    model, data = tiny_model(), batches()
    units = [3, 8, 20, 41]
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[0].mlp, name).weight.data[units] = 0
    model.model.layers[0].mlp.down_proj.weight.data[:, units] = 0
    group = find_structure(model).groups["model.layers.0.mlp"]
    kinds = [Taylor(order=o, level=v) for o in ("first", "second", "mixed") for v in ("element",)]
    for importance in (*kinds, Taylor(level="vector"), Magnitude()):
        scores = importance.scores(model, [group], data, None)["model.layers.0.mlp"]
        assert scores[units].abs().max() == 0 and (scores > 0).sum() == 44
    before = answers(model)
    result = prune(model, data=data, keep={"model.layers.0.mlp": (scores > 0)})
    assert result.after < result.before
    torch.testing.assert_close(answers(model), before, rtol=1e-5, atol=1e-5)


def test_mixed_without_curvature_is_first_order() -> None:
    """At a tenth of the weights' size w^2 h has all but gone beside w g."""
    model = tiny_model()
    group = find_structure(model).groups["model.layers.1.mlp"]

    def score(order: str, size: float) -> Tensor:
        def scaled(m: nn.Module, batch) -> Tensor:
            return size * m(**batch).loss

        return Taylor(order=order).scores(model, [group], batches(), scaled)[group.name] / size

    torch.testing.assert_close(score("mixed", 1e-6), score("first", 1e-6), rtol=1e-4, atol=0)
    assert not torch.allclose(score("mixed", 1e3), score("first", 1e3), rtol=1e-2)


def test_scores_leave_the_model_as_it_was() -> None:
    model = tiny_model().train()
    adapter = plait.attach(model, "lora", name="a", rank=2)
    nn.init.normal_(next(iter(adapter.deltas.values())).B, std=0.1)
    groups = list(find_structure(model).groups.values())
    flags = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    for importance in (Taylor(), LoraGradient()):
        chosen = groups if isinstance(importance, Taylor) else [g for g in groups if g.inner]
        importance.scores(model, chosen, batches(), None)
        assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == flags
        assert model.training and adapter.state.active == {"a": 1.0}


def test_steps_look_again_after_each_part() -> None:
    class Counting(Importance):
        seen: list[list[int]] = []  # noqa: RUF012

        def scores(self, model, groups, data, loss):
            self.seen.append([len(m._forward_pre_hooks) for m in model.modules()])
            return Random().scores(model, groups, data, loss)

    prune(tiny_model(), ratio=0.5, importance=Counting(), data=batches(), steps=3)
    assert [sum(hooks) for hooks in Counting.seen] == [0, 2, 4] or [
        sum(hooks) > 0 for hooks in Counting.seen
    ] == [False, True, True]


def test_importance_that_looks_at_data_beats_chance() -> None:
    """After some training the loss rises least where Taylor chose."""
    from tiny import batch, llama

    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        loss = model(**batch(rows=16, seed=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held = batch(rows=64, seed=999)

    def loss_after(importance, **more) -> float:
        smaller = copy.deepcopy(model)
        data = [batch(rows=4, seed=900 + i) for i in range(4)]
        prune(smaller, ratio=0.4, data=data, importance=importance, **more)
        with torch.no_grad():
            return float(smaller(**held).loss)

    by_chance = sorted(loss_after(Random(seed=s)) for s in range(3))
    assert loss_after(Taylor(order="first")) < by_chance[0]
    assert loss_after("taylor") < by_chance[0]


def test_what_is_asked_for_must_make_sense() -> None:
    model = tiny_model()
    with pytest.raises(PlaitError, match="needs data="):
        prune(model)
    with pytest.raises(PlaitError, match="ratio lies in"):
        prune(model, ratio=1.0, importance="magnitude")
    with pytest.raises(PlaitError, match="did you mean 'taylor'"):
        prune(model, importance="tailor", data=batches())
    with pytest.raises(PlaitError, match="scope is 'globl'"):
        prune(model, scope="globl", importance="magnitude")
    with pytest.raises(PlaitError, match="did you mean"):
        prune(model, keep={"model.layers.0.mpl": [1]})
    with pytest.raises(PlaitError, match="some of its 48 units"):
        prune(model, keep={"model.layers.0.mlp": [48]})
    with pytest.raises(PlaitError, match="load one"):
        prune(model, importance="lora", data=batches())
    with pytest.raises(PlaitError, match="no group of units"):
        prune(nn.Linear(3, 3), importance="magnitude", data=[{"input": torch.randn(2, 3)}])


def test_widths_stay_multiples() -> None:
    result = prune(tiny_model(), ratio=0.3, importance="magnitude", multiple=8)
    assert result.config == {"intermediate_size": 32}
