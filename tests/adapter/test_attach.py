"""attach, detach, activate, weights, seeds, overrides: the life of adapters on one model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import plait
from plait import PlaitError
from plait.adapter import Delta, Method, Options, SharedTensors, per_site
from plait.testing import make_model, perturb


@pytest.fixture
def model() -> nn.Module:
    return make_model("linear")


def x(batch: int = 4) -> Tensor:
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(3))


def added(model: nn.Module, name: str, seed: int, **options: object) -> plait.Adapter:
    adapter = plait.attach(model, "lora", name=name, seed=seed, activate=False, **options)
    perturb(adapter, seed)
    return adapter


def by_hand(adapters: dict[str, plait.Adapter], weights: dict[str, float], x: Tensor) -> Tensor:
    """Logits of the base with the weighted sum of dW written in, all in float64."""
    model = make_model("linear", torch.float64)
    with torch.no_grad():
        for name, weight in weights.items():
            for path, delta in adapters[name].deltas.items():
                A, B = delta.A.double(), delta.B.double()
                model.get_submodule(path).weight += weight * delta.scaling * B @ A
        return model(x.double()).logits


# -- the model stays itself ------------------------------------------------------------------------


def test_modules_keep_name_place_and_class(model: nn.Module) -> None:
    names = dict(model.named_modules())
    plait.attach(model, "lora", rank=2)
    for name, module in names.items():
        assert model.get_submodule(name) is module if name else module is model
    assert isinstance(model.head, nn.Linear) and type(model.head).__name__ == "AdaptedLinear"
    assert type(model.head) is type(model.layers[0].up), "one subclass for all, or caches miss"


def test_the_base_is_frozen_while_attached_and_trains_again_after(model: nn.Module) -> None:
    model.head.bias.requires_grad_(False)
    base = dict(model.named_parameters())
    adapter = plait.attach(model, "lora", rank=2)
    assert not any(p.requires_grad for p in base.values())
    assert all(p.requires_grad for p in adapter.parameters())
    plait.attach(model, "lora", rank=2, name="second")
    plait.detach(model, "default")
    assert not any(p.requires_grad for p in base.values())
    plait.detach(model)
    flags = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert flags == {"head.bias"} and "_plait" not in model.__dict__


def test_train_and_eval_reach_the_deltas(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2, dropout=0.5)
    assert not any(d.training for d in adapter.deltas.values())
    model.train()
    assert all(d.training for d in adapter.deltas.values())


def test_dropout_acts_in_training_only(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2, dropout=0.5)
    perturb(adapter)
    assert torch.equal(model(x()).logits, model(x()).logits)
    model.train()
    assert not torch.equal(model(x()).logits, model(x()).logits)


def test_the_adapter_follows_the_model_to_another_dtype(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    model.double()
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    wide = make_model("linear", torch.float64)
    assert {p.dtype for p in plait.attach(wide, "lora").parameters()} == {torch.float64}
    half = make_model("linear", torch.bfloat16)
    assert {p.dtype for p in plait.attach(half, "lora").parameters()} == {torch.float32}
    given = plait.attach(half, "lora", name="b", dtype=torch.bfloat16)
    assert {p.dtype for p in given.parameters()} == {torch.bfloat16}


def test_forward_hooks_of_the_base_still_run(model: nn.Module) -> None:
    seen: list[str] = []
    model.head.register_forward_hook(lambda m, args, out: seen.append("after"))
    plait.attach(model, "lora", rank=2)
    model.head.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model(x())
    assert seen == ["before", "after"]


def test_a_keyword_argument_reaches_the_site(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2)
    perturb(adapter)
    assert torch.equal(model.head(input=x()), model.head(x()))


# -- several adapters ------------------------------------------------------------------------------

WEIGHTS = [
    {},
    {"a": 1.0},
    {"a": 1.0, "b": 1.0},
    {"a": 0.3, "b": -1.7},
    {"b": 2.0},
    {"a": 0.0, "b": 1.0},
    {"a": 0.5, "b": 0.25, "c": 4.0},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_sums_match_the_dense_formula(model: nn.Module, weights: dict) -> None:
    adapters = {
        "a": added(model, "a", 1, rank=2),
        "b": added(model, "b", 2, rank=3, alpha=5, targets=["up", "head"]),
        "c": added(model, "c", 3, rank=1, rslora=True, targets=["down"]),
    }
    plait.activate(model, weights)
    wanted = by_hand(adapters, weights, x())
    torch.testing.assert_close(model(x()).logits.double(), wanted, atol=1e-5, rtol=1e-5)


def test_weights_may_be_tensors_that_learn(model: nn.Module) -> None:
    adapters = {"a": added(model, "a", 1, rank=2), "b": added(model, "b", 2, rank=2)}
    weight = torch.tensor([0.3, 0.6], requires_grad=True)
    plait.activate(model, {"a": weight[0], "b": weight[1]})
    out = model(x()).logits
    wanted = by_hand(adapters, {"a": 0.3, "b": 0.6}, x())
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    step = 1e-2
    for i in range(2):
        values = [0.3, 0.6]
        sides = []
        for sign in (1, -1):
            values[i] = weight[i].item() + sign * step
            sides.append(by_hand(adapters, dict(zip("ab", values, strict=True)), x()))
        slope = (sides[0].square().sum() - sides[1].square().sum()) / (2 * step)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad[i].double(), slope, rtol=1e-3, atol=1e-3)


def test_sites_may_have_weights_of_their_own(model: nn.Module) -> None:
    adapter = added(model, "a", 1, rank=2)
    first, second = list(adapter.deltas)[:2]
    gate = torch.tensor(0.3, requires_grad=True)
    plait.activate(model, {"a": {first: gate, second: 0.0}})
    parts = dict.fromkeys(adapter.deltas, 1.0) | {first: 0.3, second: 0.0}
    reference = make_model("linear").double()
    for path, weight in parts.items():
        dense = adapter.deltas[path].dense().detach().double()
        reference.get_submodule(path).weight.data += weight * dense
    out = model(x()).logits
    torch.testing.assert_close(out.double(), reference(x().double()).logits, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert gate.grad is not None and gate.grad != 0
    plait.activate(model, "a")
    plain = model(x()).logits
    plait.activate(model, {"a": {}})  # a site that is not named has weight 1
    torch.testing.assert_close(model(x()).logits, plain)
    with pytest.raises(plait.PlaitError, match="unknown site"):
        plait.activate(model, {"a": {"layers.99": 1.0}})


def test_activate_takes_a_name_several_or_a_mapping(model: nn.Module) -> None:
    adapters = {"a": added(model, "a", 1, rank=2), "b": added(model, "b", 2, rank=2)}
    base = make_model("linear")(x()).logits
    assert torch.equal(model(x()).logits, base), "activate=False keeps the base"
    for given, same in [("a", {"a": 1.0}), (["a", "b"], {"a": 1.0, "b": 1.0}), ([], {})]:
        plait.activate(model, given)
        wanted = by_hand(adapters, same, x())
        torch.testing.assert_close(model(x()).logits.double(), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x()).logits, base)


def test_attaching_makes_the_new_adapter_the_only_active_one(model: nn.Module) -> None:
    first = added(model, "a", 1, rank=2)
    plait.activate(model, "a")
    second = plait.attach(model, "lora", rank=2, name="b", seed=2)
    assert torch.equal(model(x()).logits, make_model("linear")(x()).logits)
    perturb(second)
    loss = model(x()).logits.sum()
    loss.backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters())


def test_detaching_an_active_adapter_leaves_the_others_active(model: nn.Module) -> None:
    adapters = {"a": added(model, "a", 1, rank=2), "b": added(model, "b", 2, rank=2)}
    plait.activate(model, {"a": 1.0, "b": 0.5})
    plait.detach(model, "a")
    wanted = by_hand(adapters, {"b": 0.5}, x())
    torch.testing.assert_close(model(x()).logits.double(), wanted, atol=1e-5, rtol=1e-5)
    assert list(plait.adapters(model)) == ["b"]


def test_a_detached_adapter_still_answers_and_can_go_back(model: nn.Module) -> None:
    adapter = added(model, "a", 1, rank=2)
    plait.activate(model, "a")
    out = model(x()).logits
    plait.detach(model)
    assert adapter.model is None and adapter.deltas["head"].dense().shape == (10, 12)
    with pytest.raises(PlaitError, match="not attached"):
        _ = adapter.deltas["head"].site.base
    from plait.adapter import bind, install

    install(model, bind(adapter, model))
    assert torch.equal(model(x()).logits, out)


# -- mistakes --------------------------------------------------------------------------------------


def test_unknown_names_are_errors_that_name_the_nearest(model: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"method 'lroa'.*did you mean 'lora'"):
        plait.attach(model, "lroa")
    with pytest.raises(PlaitError, match=r"option 'rnk'.*did you mean 'rank'"):
        plait.attach(model, "lora", rnk=4)
    plait.attach(model, "lora", name="french")
    with pytest.raises(PlaitError, match=r"adapter 'frensh'.*did you mean 'french'"):
        plait.activate(model, "frensh")
    with pytest.raises(PlaitError, match=r"adapter 'frenc'.*'french'"):
        plait.detach(model, "frenc")
    with pytest.raises(PlaitError, match=r"site 'layers.0.upp'.*'layers.0.up'"):
        _ = plait.adapters(model)["french"].deltas["layers.0.upp"]


def test_a_name_taken_or_badly_formed_is_refused(model: nn.Module) -> None:
    plait.attach(model, "lora")
    with pytest.raises(PlaitError, match="'default' is already attached"):
        plait.attach(model, "lora")
    for bad in ("a.b", "a|b", "", "a b", "../x"):
        with pytest.raises(PlaitError, match="letters, digits"):
            plait.attach(model, "lora", name=bad)
    assert list(plait.adapters(model)) == ["default"]


def test_a_failed_attach_leaves_the_model_untouched(model: nn.Module) -> None:
    keys = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    for bad in ({"targets": ["nothing"]}, {"rnk": 3}, {"overrides": {"nothing": {"rank": 1}}}):
        with pytest.raises(PlaitError):
            plait.attach(model, "lora", **bad)
    assert {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()} == keys
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_adapters_says_so(model: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"no adapters.*attach"):
        plait.detach(model)
    with pytest.raises(PlaitError, match="no adapters"):
        plait.activate(model, "a")
    plait.activate(model, {})
    assert plait.adapters(model) == {} and plait.auxiliary_loss(model) == 0.0


def test_attaching_to_a_part_and_then_the_whole_is_refused(model: nn.Module) -> None:
    plait.attach(model.layers[0], "lora", rank=2)
    with pytest.raises(PlaitError, match="already carry adapters"):
        plait.attach(model, "lora", rank=2)


def test_a_rule_is_not_something_to_attach(model: nn.Module) -> None:
    rule = Method("a-rule", "A rule", "none", "rule", rule=plait.Rule)
    with pytest.raises(PlaitError, match="combine it with a parameterisation"):
        plait.attach(model, rule)


# -- overrides -------------------------------------------------------------------------------------


def test_overrides_follow_rank_pattern_rules_and_the_first_match_wins(model: nn.Module) -> None:
    overrides = {
        "layers.0.up": {"rank": 1},  # the whole path
        r"layers\.\d+\.up": {"rank": 3},  # a regular expression of an ending
        "down": {"rank": 4, "alpha": 4},  # an ending
        "^head$": {"rank": 5},  # anchored
    }
    adapter = plait.attach(model, "lora", rank=2, alpha=6, overrides=overrides)
    ranks = {p: d.rank for p, d in adapter.deltas.items()}
    assert ranks == {
        "layers.0.up": 1,
        "layers.0.down": 4,
        "layers.1.up": 3,
        "layers.1.down": 4,
        "head": 5,
    }
    assert adapter.deltas["layers.0.down"].scaling == 1 and adapter.deltas["head"].scaling == 6 / 5


def test_an_anchored_override_matches_no_ending(model: nn.Module) -> None:
    with pytest.raises(PlaitError, match="matches no targeted site"):
        plait.attach(model, "lora", overrides={"^up": {"rank": 1}})


def test_an_override_ends_at_a_dot(model: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"'p' matches no targeted site"):
        plait.attach(model, "lora", overrides={"p": {"rank": 1}})  # not the end of "up"
    with pytest.raises(PlaitError, match=r"'dwn'.*did you mean 'down'"):
        plait.attach(model, "lora", overrides={"dwn": {"rank": 1}})


def test_an_override_of_an_unknown_option_names_the_nearest(model: nn.Module) -> None:
    with pytest.raises(PlaitError, match=r"option 'rnk'.*did you mean 'rank'"):
        plait.attach(model, "lora", overrides={"down": {"rnk": 1}})


# -- seeds -----------------------------------------------------------------------------------------


def test_a_seed_governs_each_site_apart_from_the_others() -> None:
    def start(seed: int, **more: object) -> dict[str, Tensor]:
        adapter = plait.attach(make_model("linear"), "lora", rank=2, seed=seed, **more)
        return {p: d.A.detach().clone() for p, d in adapter.deltas.items()}

    everywhere, few = start(5), start(5, targets=["head"])
    assert torch.equal(everywhere["head"], few["head"]), "a site's draw depends on other sites"
    assert not torch.equal(everywhere["layers.0.up"], everywhere["layers.1.up"])
    assert not torch.equal(everywhere["head"], start(6)["head"])


def test_without_a_seed_torchs_generator_governs() -> None:
    def start(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return plait.attach(make_model("linear"), "lora", rank=2).deltas["head"].A

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


# -- shared tensors --------------------------------------------------------------------------------


class Pooled(Delta):
    """dW = a pool of rows shared by all sites, times a frozen shared factor, by a site's number."""

    @classmethod
    def prepare(cls, sites, options, shared: SharedTensors) -> None:  # type: ignore[no-untyped-def]
        shared.pool("rows", (16, 2), "normal")
        shared.frozen("columns", (2, 16), "normal")
        shared.notes["place"] = {s.path: i for i, s in enumerate(sites)}

    def build(self) -> None:
        self.parameter("size", 1)

    def dense(self) -> Tensor:
        rows, columns = self.site.shape
        place = 1 + self.shared.notes["place"][self.site.path]
        table = self.shared["rows"][:rows] @ self.shared["columns"][:, :columns]
        return place * self.get_parameter("size") * table


POOLED = Method(
    "pooled-for-tests",
    "Pooled",
    "none",
    "parameterisation",
    Options,
    Pooled,
    per_site(lambda s, o: 1),
)


def test_shared_tensors_are_owned_and_saved_once(model: nn.Module) -> None:
    adapter = plait.attach(model, POOLED, seed=1)
    assert adapter.num_parameters() == 5 + 32
    assert [k for k in adapter.state_dict() if k.startswith("shared:")] == ["shared:rows"]
    assert set(adapter.seeded_tensors()) == {"shared:columns"}
    named = [n for n, _ in model.named_parameters() if n.endswith("rows")]
    assert len(named) == 1, "the optimiser of a stranger must see the pool once"
    perturb(adapter)
    model(x()).logits.sum().backward()
    assert adapter.shared["rows"].grad is not None


def test_two_adapters_have_a_registry_each(model: nn.Module) -> None:
    a, b = (plait.attach(model, POOLED, name=n, seed=s) for n, s in (("a", 1), ("b", 2)))
    assert not torch.equal(a.shared["rows"], b.shared["rows"])
    with torch.no_grad():
        a.shared["rows"].zero_()
    assert bool(b.shared["rows"].any())
    plait.detach(model, "a")
    perturb(b)
    assert not torch.equal(model(x()).logits, make_model("linear")(x()).logits)


def test_deltas_see_a_pool_that_was_moved_or_copied(model: nn.Module) -> None:
    adapter = plait.attach(model, POOLED, seed=1)
    perturb(adapter)
    other = copy.deepcopy(model)
    out = model(x()).logits
    with torch.no_grad():
        adapter.shared["rows"].zero_()
    assert torch.equal(other(x()).logits, out)
    model.double()
    assert model(x().double()).logits.dtype == torch.float64


def test_shared_tensors_are_float64_beside_a_float64_base() -> None:
    adapter = plait.attach(make_model("linear", torch.float64), POOLED, seed=1)
    assert {t.dtype for t in adapter.shared.state_dict().values()} == {torch.float64}
    assert adapter.shared["columns"].dtype == torch.float64


def test_a_shared_name_registered_twice_is_an_error() -> None:
    shared = SharedTensors(0, torch.float32, torch.device("cpu"))
    shared.pool("rows", (2, 2))
    with pytest.raises(PlaitError, match="'rows' is registered twice"):
        shared.frozen("rows", (2, 2), "normal")


# -- tensors in and out ----------------------------------------------------------------------------


def test_load_state_dict_names_what_is_missing_unknown_or_misshapen(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2)
    good = adapter.state_dict()
    first = next(iter(good))
    with pytest.raises(PlaitError, match="missing"):
        adapter.load_state_dict({k: t for k, t in good.items() if k != first})
    with pytest.raises(PlaitError, match="'more' is unknown"):
        adapter.load_state_dict({**good, "more": torch.zeros(1)})
    with pytest.raises(PlaitError, match="shape"):
        adapter.load_state_dict({**good, first: torch.zeros(1)})


def test_check_finds_numbers_that_are_none(model: nn.Module) -> None:
    adapter = plait.attach(model, "lora", rank=2)
    adapter.check()
    with torch.no_grad():
        adapter.deltas["head"].B[0, 0] = float("nan")
    with pytest.raises(PlaitError, match=r"head\.B.*NaN"):
        adapter.check()
