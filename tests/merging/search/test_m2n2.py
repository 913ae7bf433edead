"""M2N2: fitness, children and the whole evolution."""

from __future__ import annotations

import pytest
import torch
from tasks import inputs, network
from torch import Tensor, nn

import plait
from plait.errors import PlaitError
from plait.merging.search import Coefficients, search
from plait.merging.search.methods.m2n2 import crossed, fitness, inner_products

NAMES = ["one", "two"]


def test_fitness_shares_out_the_examples_that_somebody_solves() -> None:
    scores = (torch.rand(5, 30, generator=torch.Generator().manual_seed(0)) > 0.7).double()
    assert float(fitness(scores, 1.0).sum()) == pytest.approx(float(scores.any(0).sum()))
    torch.testing.assert_close(fitness(scores, 0.0), scores.sum(1))
    alone = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    twins = torch.cat([alone, alone[:1]])
    assert fitness(alone, 1.0).tolist() == [2.0, 1.0]
    assert fitness(twins, 1.0).tolist() == [1.0, 1.0, 1.0]


def places(space: Coefficients) -> list[tuple[str, int]]:
    """Each site and its one group."""
    return [(path, part.groups[0]) for path, part in space.parts.items()]


def test_a_child_is_the_slerp_of_the_flattened_changes() -> None:
    space = Coefficients(network(), NAMES, grouping="layer")
    gram = inner_products(space)
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, *space.shape, generator=g, dtype=torch.float64)
    w, cut = 0.3, 1

    def flat(c: Tensor) -> Tensor:
        return torch.cat(
            [
                sum(
                    c[i, j] * m.deltas[path].dense() for i, m in enumerate(space.adapters)
                ).flatten()
                for path, j in places(space)
            ]
        ).detach()

    sizes = torch.cat(
        [torch.full((space.adapters[0].deltas[p].dense().numel(),), j) for p, j in places(space)]
    )
    t = torch.where(sizes < cut, w, 1 - w)
    x, y = flat(a), flat(b)
    omega = torch.acos(x @ y / x.norm() / y.norm())
    expected = (torch.sin((1 - t) * omega) * x + torch.sin(t * omega) * y) / torch.sin(omega)
    torch.testing.assert_close(flat(crossed(a, b, w, cut, gram)), expected)


def test_ends_return_a_parent_and_equal_parents_return_themselves() -> None:
    space = Coefficients(network(), NAMES, grouping="layer")
    gram = inner_products(space)
    a, b = torch.randn(2, *space.shape, dtype=torch.float64)
    torch.testing.assert_close(crossed(a, b, 0.0, None, gram), a)
    torch.testing.assert_close(crossed(a, b, 1.0, None, gram), b)
    torch.testing.assert_close(crossed(a, b, 1.0, 0, gram), a)
    torch.testing.assert_close(crossed(a, a, 0.4, 1, gram), a)


def score_of(net: nn.Module):
    """Half of the examples want what one answers, half what two does."""
    x = inputs(4, rows=40)
    with torch.no_grad():
        wanted = []
        for name in NAMES:
            plait.activate(net, name)
            wanted.append(net(x).logits.argmax(-1))
    half = torch.arange(40) < 20
    target = torch.where(half, wanted[0], wanted[1])
    return lambda model: (model(x).logits.argmax(-1) == target).double()


def test_evolution_beats_its_ancestors_and_resumes(tmp_path) -> None:
    net = network()
    score = score_of(net)
    found = search(net, NAMES, "m2n2", scores=score, budget=60, archive=6, log=tmp_path / "log")
    ancestors = [-entry["value"] for entry in found.history[:2]]
    assert len(found.history) == 60 and -found.value > max(ancestors)
    found.activate()
    assert float(score(net).sum()) == -found.value
    assert found.facts["archive"].shape == (6, 2, 3)

    def refuse(model: nn.Module) -> Tensor:
        raise AssertionError("everything is known already")

    again = search(net, NAMES, "m2n2", scores=refuse, budget=60, archive=6, log=tmp_path / "log")
    assert torch.equal(again.coefficients, found.coefficients)


def test_scores_of_nobody_and_wrong_scores() -> None:
    net = network()
    options = {"evaluations": 8, "archive": 3}
    nothing = search(net, NAMES, "m2n2", scores=lambda model: torch.zeros(4), **options)
    assert nothing.value == 0 and torch.isfinite(nothing.coefficients).all()
    with pytest.raises(PlaitError, match=r"lie in \[0, 1\]"):
        search(net, NAMES, "m2n2", scores=lambda model: torch.full((4,), 2.0), evaluations=8)
