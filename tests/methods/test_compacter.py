"""Compacter against sums of torch.kron, in float64."""

import math

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny import llama, logits, losses, scramble


class Wide(nn.Module):
    """Two feed-forward blocks of width 24 in a row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def make(**options):
    model = Wide().double()
    given = {"n": 4, "reduction": 3, **options}
    adapter = plait.attach(model, "compacter", targets=["blocks.0", "blocks.1"], seed=2, **given)
    return model, adapter


def weight(adapter, delta, name):
    """sum_i C_i kron (s_i t_i), [in, out]."""
    C = adapter.shared["rules"]
    s, t = delta.get_parameter(f"s_{name}"), delta.get_parameter(f"t_{name}")
    return sum(torch.kron(C[i], s[i] @ t[i]) for i in range(len(C)))


def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def oracle(model, adapter, x):
    for i, block in enumerate(model.blocks):
        delta = adapter.deltas[f"blocks.{i}"]
        h = torch.tanh(x @ block[0].weight.t() + block[0].bias)
        z = gelu_new(h @ weight(adapter, delta, "down") + delta.b_down)
        x = h + z @ weight(adapter, delta, "up") + delta.b_up
    return x


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"n": 2, "reduction": 2}, {"n": 1}])
def test_output_and_gradients_equal_those_of_the_formula(options):
    model, adapter = make(**options)
    scramble(adapter, 0.5)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    G = torch.randn(2, 5, 24, dtype=torch.float64)
    wanted = oracle(model, adapter, x)
    torch.testing.assert_close(model(x), wanted)
    inputs = [*adapter.parameters(), x]
    got = torch.autograd.grad((model(x) * G).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((wanted * G).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rules_are_one_tensor_for_the_whole_model():
    model, adapter = make()
    scramble(adapter, 0.5)
    assert [n for n, _ in adapter.named_parameters() if "rules" in n] == ["shared:rules"]
    x = torch.randn(3, 24, dtype=torch.float64)
    whole = torch.autograd.grad(model(x).sum(), adapter.shared["rules"])[0]
    parts, rules = [], adapter.shared["rules"]
    for path in adapter.deltas:  # one site at a time with a copy of the rules of its own
        own = rules.detach().clone().requires_grad_()
        delta = adapter.deltas[path]
        delta.__dict__["shared"] = {"rules": own}
        parts.append(torch.autograd.grad(model(x).sum(), own)[0])
        delta.__dict__["shared"] = adapter.shared
    torch.testing.assert_close(whole, sum(parts))


def test_one_rule_of_one_is_a_low_rank_adapter():
    _, adapter = make(n=1, rank=2)
    scramble(adapter, 0.5)
    with torch.no_grad():
        adapter.shared["rules"].fill_(1.0)
    delta = adapter.deltas["blocks.0"]
    torch.testing.assert_close(delta.weight("down"), delta.s_down[0] @ delta.t_down[0])
    assert torch.linalg.matrix_rank(delta.weight("down")) == 2


def test_rank_of_a_matrix_is_bounded_by_its_rules():
    _, adapter = make(n=2, reduction=1)
    scramble(adapter, 0.5)
    assert torch.linalg.matrix_rank(adapter.deltas["blocks.0"].weight("up")) == 2 * 2


def test_start_is_nearly_the_base_or_exactly():
    model, adapter = make()
    h = torch.randn(50, 24, dtype=torch.float64)
    change = adapter.deltas["blocks.0"](h)
    assert 0 < change.norm() < 1e-2 * h.norm()
    C = adapter.shared["rules"]
    assert float(C.detach().std()) == pytest.approx(0.01, rel=0.4)
    model, adapter = make(start="zero")
    assert torch.equal(model(h), Wide().double()(h))


def test_count_by_formula():
    for options, k in [({}, 8), ({"reduction": 4, "rank": 3}, 4), ({"reduction": 100}, 4)]:
        _, adapter = make(**options)
        rank, sites = options.get("rank", 1), [d.site for d in adapter.deltas.values()]
        wanted = 4**3 + 2 * (2 * rank * (24 + k) + k + 24)
        assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == wanted


def test_compacter_plus_plus_by_default_and_compacter_by_name():
    model = llama()
    adapter = plait.attach(model, "compacter", reduction=4)
    assert all(path.endswith("mlp") for path in adapter.deltas)
    plait.detach(model)
    before = logits(model)
    adapter = plait.attach(model, "compacter", targets=["self_attn", "mlp"], reduction=4)
    assert len(adapter.deltas) == 4
    scramble(adapter, 0.5)
    assert (logits(model) - before).abs().max() > 1e-2


def test_files_keep_the_rules_once(tmp_path):
    model, adapter = make()
    scramble(adapter, 0.5)
    x = torch.randn(3, 24, dtype=torch.float64)
    adapter.save(tmp_path / "a")
    fresh = Wide().double()
    again = plait.load(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(x), model(x))
    deltas = list(again.deltas.values())
    assert deltas[0].shared["rules"] is deltas[1].shared["rules"] is again.shared["rules"]


def test_training():
    model = llama()
    adapter = plait.attach(model, "compacter", reduction=2, seed=0)
    found = losses(model, adapter, lr=3e-2, steps=30)
    assert found[-1] < 0.85 * found[0]


def test_impossible_options_are_refused():
    for options, message in [
        ({"n": 5}, "divide"),
        ({"n": 0}, "at least 1"),
        ({"start": "ones"}, "start"),
        ({"overrides": {"blocks.0": {"n": 2}}}, "shared"),
    ]:
        with pytest.raises(PlaitError, match=message):
            make(**options)
