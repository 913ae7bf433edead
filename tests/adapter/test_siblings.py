"""Linears that read one input run as a group: same numbers, whatever was learned."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import plait
from plait import kernels


class Attention(nn.Module):
    """q, k, v read x; o reads something else of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 4)
        self.v_proj, self.o_proj = nn.Linear(8, 4), nn.Linear(8, 6)
        self.shuffle = False

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x + 1 if self.shuffle else x)
        return self.o_proj(q + torch.cat([k, v], -1))


def attached(dropout: float = 0.0) -> Attention:
    model = Attention()
    adapter = plait.attach(model, "lora", rank=2, dropout=dropout, seed=0)
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.B)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def count_group_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    run = kernels.lora_linear_group

    def spy(x: Tensor, weights: tuple, *rest: object, **kw: object) -> tuple[Tensor, ...]:
        calls.append(len(weights))
        return run(x, weights, *rest, **kw)

    monkeypatch.setattr(kernels, "lora_linear_group", spy)
    return calls


def test_second_pass_runs_q_k_v_as_one_group_with_the_same_numbers(monkeypatch):
    calls = count_group_calls(monkeypatch)
    model, x = attached(), torch.randn(3, 5, 8)
    first = model(x)
    assert calls == []
    second = model(x.clone())
    assert calls == [3]
    torch.testing.assert_close(first, second)


def test_gradients_of_group_equal_separate():
    model, x = attached(), torch.randn(3, 5, 8)
    for ungrouped, grouped in zip(gradients(model, x), gradients(model, x), strict=True):
        torch.testing.assert_close(ungrouped, grouped)


def test_dropout_draws_the_same_mask_before_and_after_learning():
    """Otherwise a resumed run, which learns anew, would leave the uninterrupted one's path."""
    model, x = attached(dropout=0.5).train(), torch.randn(3, 5, 8)
    torch.manual_seed(1)
    first = model(x)
    after_first = torch.randint(1000, ())
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), first)
    assert torch.randint(1000, ()) == after_first


def test_sibling_with_another_input_computes_for_itself_and_is_left_out(monkeypatch):
    model, x = attached(), torch.randn(3, 5, 8)
    model(x), model(x)
    model.shuffle = True
    plain = copy.deepcopy(model)
    want = plain(x)  # a fresh copy has learned nothing
    torch.testing.assert_close(model(x), want)
    calls = count_group_calls(monkeypatch)
    torch.testing.assert_close(model(x), want)
    assert calls == [2]


def test_input_changed_in_place_between_siblings_is_seen():
    class InPlace(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            with torch.no_grad():
                x.mul_(2)
            return self.o_proj(q + torch.cat([self.k_proj(x), self.v_proj(x)], -1))

    model = InPlace()
    adapter = plait.attach(model, "lora", rank=2, seed=0)
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.B)
    x = torch.randn(3, 8)
    outputs = [model(x.clone()) for _ in range(4)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_grouped_model_still_pickles_and_copies():
    model, x = attached(), torch.randn(3, 5, 8)
    model(x)
    want = model(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), want)
    torch.testing.assert_close(copy.deepcopy(model)(x), want)


def test_nothing_is_kept_alive_after_a_forward():
    import gc
    import weakref

    model, x = attached(), torch.randn(3, 5, 8)
    model(x), model(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None


def test_answers_are_the_same_bits_from_the_first_call_on():
    model, x = attached(), torch.randn(3, 5, 8)
    with torch.no_grad():
        first = model(x)
        assert all(torch.equal(model(x.clone()), first) for _ in range(3))


class Crossed(nn.Module):
    """`b` stands between two that read x, and all three are of one family."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.c(x)


def test_one_tensor_fed_for_ever_never_meets_what_an_earlier_pass_left() -> None:
    torch.manual_seed(0)
    model = Crossed()
    adapter = plait.attach(model, "lora", rank=2, seed=0)
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.B)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 8)
    runs = [plait.RuleStack(m, lr=0.1) for m in (model, twin)]
    for _ in range(5):
        losses = []
        for m, run, given in ((model, runs[0], x), (twin, runs[1], x.clone())):
            loss = m(given).square().mean()
            loss.backward()
            run.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
