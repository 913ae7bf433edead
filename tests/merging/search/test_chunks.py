"""Coefficients of chunks of rows and columns, and Expert Merging++ upon them, against dense W."""

from __future__ import annotations

import json

import pytest
import torch
from tasks import inputs, network, planted, squared
from torch import Tensor

import plait
from plait.errors import FormatError, PlaitError
from plait.merging.search import (
    Coefficients,
    descend,
    evaluate,
    read_coefficients,
    search,
    supervised,
    value_and_gradient,
)
from plait.merging.search.methods.m2n2 import inner_products
from plait.merging.search.stored import write_coefficients

NAMES = ["one", "two"]


def chunked(net, chunks=3, along: str = "rows", **options) -> Coefficients:
    return Coefficients(net, NAMES, grouping="site", chunks=chunks, along=along, **options)


def drawn(space: Coefficients, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(space.shape, generator=g, dtype=torch.float64)


def dense_sum(space: Coefficients, c: Tensor, count: int) -> dict[str, Tensor]:
    """sum_i dW_i with its pieces scaled, by cutting dense matrices with torch.tensor_split."""
    found: dict[str, Tensor] = {}
    for path in space.parts:
        dim = 0 if space.parts[path].along == "rows" else 1
        total = 0
        for i, adapter in enumerate(space.adapters):
            pieces = adapter.deltas[path].dense().detach().tensor_split(count, dim)
            groups = [j for j, name in enumerate(space.groups) if name.startswith(f"{path} [")]
            assert len(groups) == count
            scaled = [c[i, j] * piece for j, piece in zip(groups, pieces, strict=True)]
            total = total + torch.cat(scaled, dim)
        found[path] = total
    return found


def answers(changes: dict[str, Tensor]) -> Tensor:
    plain = network(())
    with torch.no_grad():
        for path, change in changes.items():
            plain.get_submodule(path).weight += change
    return plain(inputs(9)).logits.detach()


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_attached_merged_and_dense_chunks_are_one(along: str, count: int) -> None:
    net = network()
    space = chunked(net, count, along)
    assert space.shape == (2, 5 * count)
    c = drawn(space)
    wanted = dense_sum(space, c, count)
    space.use(c)
    torch.testing.assert_close(net(inputs(9)).logits, answers(wanted))
    found = descend(space, lambda model, step: model(inputs(9)).logits.square().mean(), steps=1)
    merged = type(found)(space, c, 0.0, []).merged()
    for path, delta in merged.deltas.items():
        torch.testing.assert_close(delta.dense(), wanted[path], rtol=1e-6, atol=1e-9)
        assert delta.rank == sum(a.deltas[path].rank for a in space.adapters)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_gradients_are_inner_products_with_the_dense_gradients_piece(along: str) -> None:
    net = network()
    space = chunked(net, 3, along, start=0.4)
    loss = supervised(planted(net, {"one": 0.7, "two": 0.25})[:1], squared)
    with space.searching():
        _, found = value_and_gradient(space, loss, space.start)
    plain, data = network(()), planted(net, {"one": 0.7, "two": 0.25})[:1]
    with torch.no_grad():
        for path, change in dense_sum(space, space.start, 3).items():
            plain.get_submodule(path).weight += change
    squared(plain, data[0]).backward()
    for path, part in space.parts.items():
        dim = 0 if along == "rows" else 1
        gradient = plain.get_submodule(path).weight.grad
        for i, adapter in enumerate(space.adapters):
            product = (gradient * adapter.deltas[path].dense().detach()).tensor_split(3, dim)
            expected = torch.stack([piece.sum() for piece in product])
            torch.testing.assert_close(found[i, list(part.groups)], expected, rtol=1e-5, atol=1e-9)


def test_equal_chunks_are_one_coefficient() -> None:
    net = network()
    whole = Coefficients(net, NAMES, grouping="site")
    many = chunked(net, 4)
    c = drawn(whole)
    groups = torch.tensor([whole.groups.index(name.split(" [")[0]) for name in many.groups])
    whole.use(c)
    expected = net(inputs(9)).logits
    many.use(c[:, groups])
    torch.testing.assert_close(net(inputs(9)).logits, expected)


def test_more_chunks_than_rows_are_one_for_each_and_patterns_choose_sites() -> None:
    net = network()
    rows = chunked(net, {"head": 10**6, "*.down": 2})
    assert sum(name.startswith("head") for name in rows.groups) == 5
    assert sum("down" in name for name in rows.groups) == 4
    assert rows.shape[1] == 5 + 4 + 2
    tied = Coefficients(net, NAMES, grouping="layer", chunks=2)
    assert tied.groups[0] == "layers.0 [rows 1 of 2]" and tied.shape[1] == 6


def test_no_chunks_hold_a_site_at_the_start() -> None:
    net = network()
    space = chunked(net, {"head": 0}, start=0.3)
    loss = supervised(planted(net, {"one": 0.7, "two": 0.25})[:1], squared)
    found = descend(space, loss, steps=5, lr=0.1)
    assert not any(name.startswith("head") for name in space.groups)
    assert [w["head"] for w in found.weights()] == [0.3, 0.3]
    assert all(w["layers.0.up"] != 0.3 for w in found.weights())
    with pytest.raises(PlaitError, match="every site is held"):
        chunked(net, 0)
    with pytest.raises(PlaitError, match="start is a number or one an adapter"):
        chunked(net, {"head": 0}, start=torch.rand(2, 4))


def test_planted_chunks_are_found() -> None:
    net = network()
    space = chunked(net, 2, start=0.5)
    planted_c = 0.2 + 0.6 * drawn(space)
    space.use(planted_c)
    x = inputs(0, rows=60)
    target = net(x).logits.detach()
    loss = lambda model, step: (model(x).logits - target).square().mean()  # noqa: E731
    found = descend(space, loss, steps=300, lr=0.05)
    assert (found.coefficients - planted_c).abs().max() < 0.02


def test_coefficients_in_a_file_act_as_they_did(tmp_path) -> None:
    net = network()
    for along in ("rows", "columns"):
        space = chunked(net, {"head": 2, "*.up": 3}, along)
        c = drawn(space)
        space.use(c)
        expected = net(inputs(9)).logits
        file = write_coefficients(tmp_path / "c.json", space.described_weights(c))
        plait.activate(net, read_coefficients(file))
        assert torch.equal(net(inputs(9)).logits, expected)
        assert set(json.loads(file.read_text())["one"]["head"]) == {along, "of"}


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[1]",
        '{"a": {"s": "x"}}',
        '{"a": {"s": {"rows": [1, 2]}}}',
        '{"a": {"s": true}}',
    ],
)
def test_files_of_something_else_are_refused(text: str, tmp_path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(FormatError, match=r"c\.json"):
        read_coefficients(tmp_path / "c.json")


def test_inner_products_of_chunks_are_those_of_dense_pieces() -> None:
    space = chunked(network(), 2)
    gram = inner_products(space)
    for path, part in space.parts.items():
        pieces = [a.deltas[path].dense().detach().tensor_split(2) for a in space.adapters]
        for j, group in enumerate(part.groups):
            expected = torch.stack(
                [torch.stack([(p[j] * q[j]).sum() for q in pieces]) for p in pieces]
            )
            torch.testing.assert_close(gram[group], expected)


@pytest.mark.parametrize("name", ["adamerging", "fw-merging", "lora-soups"])
def test_methods_that_follow_gradients_take_chunks(name: str) -> None:
    net = network()
    data = planted(net, {"one": 0.7, "two": 0.25})[:1]
    if name == "adamerging":
        data = [{"x": batch["x"]} for batch in data]
    options = {"grouping": "layer", "chunks": {"layers.*": 2}, "along": "columns", "steps": 2}
    found = search(net, NAMES, name, data, loss=squared, **options)
    assert found.space.shape == (2, 2 + 2 + 1)
    found.activate()
    attached = net(inputs(9)).logits.detach()
    changes = {path: d.dense() for path, d in found.merged().deltas.items()}
    torch.testing.assert_close(answers(changes), attached)


# -- Expert Merging++ ----------------------------------------------------------------------------


def experts() -> dict[str, list[dict[str, Tensor]]]:
    return {"one": [{"x": inputs(3)}], "two": [{"x": inputs(4)}]}


def test_plus_plus_gives_important_sites_more_pieces(tmp_path) -> None:
    net = network()
    options = {"chunks": 3, "steps": 12, "beta": 0.0, "log": tmp_path / "log"}
    found = search(net, NAMES, "expert-merging", experts(), **options)
    sizes, pieces = found.facts["importance"], found.facts["chunks"]
    assert max(pieces.values()) == 3 and len(set(pieces.values())) > 1
    for path, count in pieces.items():
        assert count == max(1, round(3 * sizes[path]))
        assert len(found.space.parts[path].groups) == count
    assert found.space.shape[1] == sum(pieces.values())
    assert len(found.history) == 2 * 13
    assert (
        found.history[13]["point"]
        == [[pytest.approx(-2.1972, abs=1e-4)] * sum(pieces.values())] * 2
    )
    found.activate()
    attached = net(inputs(9)).logits
    plain = network(())
    for path, delta in found.merged().deltas.items():
        plain.get_submodule(path).weight.data += delta.dense()
    torch.testing.assert_close(plain(inputs(9)).logits, attached)


def test_plus_plus_imitates_better_than_one_coefficient_a_site() -> None:
    net = network(size=0.6)
    options = {"steps": 60, "beta": 0.0, "each": None, "form": "free", "lr": 0.05}
    one = search(net, NAMES, "expert-merging", experts(), **options)
    many = search(net, NAMES, "expert-merging", experts(), chunks=6, **options)
    assert many.value < one.value


def test_plus_plus_goes_on_in_its_second_round(tmp_path) -> None:
    net = network()
    options = {"chunks": 3, "budget": 20}
    whole = search(net, NAMES, "expert-merging", experts(), log=tmp_path / "a", **options)
    assert len(whole.history) == 20
    lines = (tmp_path / "a").read_text().splitlines(keepends=True)
    assert len(lines) == 2 + 20
    (tmp_path / "b").write_text("".join(lines[:17]) + lines[17][:30])
    again = search(net, NAMES, "expert-merging", experts(), log=tmp_path / "b", **options)
    assert torch.equal(again.coefficients, whole.coefficients)
    assert (tmp_path / "b").read_text() == (tmp_path / "a").read_text()


def test_an_earlier_stage_that_goes_on_drops_the_later_one(tmp_path) -> None:
    net = network()
    search(net, NAMES, "expert-merging", experts(), chunks=3, budget=20, log=tmp_path / "a")
    longer = search(
        net, NAMES, "expert-merging", experts(), chunks=3, budget=24, log=tmp_path / "a"
    )
    fresh = search(net, NAMES, "expert-merging", experts(), chunks=3, budget=24, log=tmp_path / "b")
    assert torch.equal(longer.coefficients, fresh.coefficients)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_unimportant_sites_may_be_held_and_patterns_given() -> None:
    net = network()
    held = search(net, NAMES, "expert-merging", experts(), chunks=2, hold=True, steps=3)
    zeros = [path for path, count in held.facts["chunks"].items() if count == 0]
    assert all(weights[path] == 0.1 for path in zeros for weights in held.weights())
    given = search(net, NAMES, "expert-merging", experts(), chunks={"head": 4, "*.up": 0}, steps=3)
    assert given.space.shape[1] == 4 + 2 and len(given.history) == 4


def test_the_middle_block_is_found_where_there_are_blocks() -> None:
    from plait.merging.search import Problem
    from plait.merging.search.methods.expert_merging import ExpertMerging
    from tiny_llama import tiny_llama

    model = tiny_llama()
    plait.attach(model, "lora", name="one", targets="all-linear")
    assert ExpertMerging()._hidden(Problem(model, ["one"])) == ["model.layers.1"]
    assert ExpertMerging()._hidden(Problem(network(), NAMES)) == []
    with pytest.raises(PlaitError, match="unknown module 'nowhere'"):
        search(network(), NAMES, "expert-merging", experts(), hidden=["nowhere"])
    with pytest.raises(PlaitError, match="'layers' does not run"):
        search(network(), NAMES, "expert-merging", experts(), hidden=["layers"])


def test_a_search_does_not_need_the_chunked_model_to_be_put_back() -> None:
    net = network()
    plait.activate(net, {"one": 0.5})
    before = net(inputs()).logits
    space = chunked(net, 2)
    evaluate(space, lambda model, step: model(inputs()).logits.mean(), drawn(space))
    assert torch.equal(net(inputs()).logits, before)
