"""Packing, order and collation: the model sees every example once, whole and alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from plait.training.data import (
    IGNORE,
    Collator,
    Encoded,
    LengthGroupedSampler,
    block_mask,
    length_grouped_order,
    pack,
)


def example(length: int, start: int = 1, masked: int = 0) -> Encoded:
    ids = [1 + (start + 7 * place) % 62 for place in range(length)]
    return Encoded(ids, [IGNORE] * masked + ids[masked:])


LENGTHS = st.lists(st.integers(1, 20), max_size=60)


@settings(max_examples=80, deadline=None)
@given(LENGTHS)
def test_packing_is_first_fit_decreasing_and_keeps_every_example(lengths: list[int]) -> None:
    examples = [example(length, start) for start, length in enumerate(lengths)]
    rows = pack(examples, max_length=20)
    naive: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [place for place, used in enumerate(naive) if used + length <= 20]
        if fits:
            naive[fits[0]] += length
        else:
            naive.append(length)
    assert [len(row) for row in rows] == naive
    parts = []
    for row in rows:
        for number in range(max(row.segments) + 1):
            places = [place for place, segment in enumerate(row.segments) if segment == number]
            assert [row.position_ids[place] for place in places] == list(range(len(places)))
            assert row.labels[places[0]] == IGNORE
            assert all(row.labels[place] == row.input_ids[place] for place in places[1:])
            parts.append([row.input_ids[place] for place in places])
    assert sorted(parts) == sorted(item.input_ids for item in examples)


def test_an_example_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="21 tokens, more than max_length=20"):
        pack([example(3), example(21)], max_length=20)


def test_block_mask_by_hand() -> None:
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert block_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0].int().tolist() == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_packed_row_gives_the_gradient_of_its_examples_alone(
    attention: str, use_cache: bool
) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=attention,
        use_cache=use_cache,
    )
    model = LlamaForCausalLM(config).double()  # the model's own loss would be in float32
    examples = [example(7, 3, masked=2), example(5, 20), example(4, 40, masked=1), example(9, 11)]

    def gradients(batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    alone = gradients([Collator(0, multiple=1)([item]) for item in examples])
    rows = pack(examples, max_length=13)
    assert len(rows) == 2
    packed = gradients([Collator(0, attention=attention, dtype=torch.double)(rows)])
    tolerance = 1e-9 if attention == "sdpa" else 1e-5  # eager takes its softmax in float32
    for one, other in zip(alone, packed, strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def test_padding_on_the_right_to_a_multiple() -> None:
    batch = Collator(pad_token_id=63)([example(5), example(11, masked=3)])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 16),
        "labels": (2, 16),
        "attention_mask": (2, 16),
    }
    assert batch["attention_mask"].sum(1).tolist() == [5, 11]
    assert (batch["input_ids"][0, 5:] == 63).all() and (batch["labels"][0, 5:] == IGNORE).all()
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_stays_within_max_length() -> None:
    assert Collator(0, max_length=10)([example(9)])["input_ids"].shape == (1, 10)


def test_flash_attention_gets_positions_only() -> None:
    batch = Collator(0, attention="flash_attention_2")(pack([example(3), example(4)], 8))
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 7), st.integers(0, 9), st.integers(0, 3))
def test_the_order_is_a_permutation_and_depends_on_seed_and_epoch_only(
    lengths: list[int], batch: int, seed: int, epoch: int
) -> None:
    order = length_grouped_order(lengths, batch, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == length_grouped_order(lengths, batch, seed, epoch)
    if len(lengths) >= batch:
        assert max(lengths, default=0) in [lengths[index] for index in order[:batch]]


def test_the_order_is_the_same_on_every_machine() -> None:
    lengths = [5, 9, 2, 7, 3, 8, 1, 6, 4, 10]
    assert length_grouped_order(lengths, 3, seed=1, epoch=0) == [9, 1, 5, 8, 4, 2, 3, 7, 0, 6]


def test_batches_hold_similar_lengths() -> None:
    lengths = [(37 * n) % 101 + 1 for n in range(400)]

    def padding(order: list[int]) -> int:
        chunks = [[lengths[i] for i in order[s : s + 8]] for s in range(0, 400, 8)]
        return sum(len(chunk) * max(chunk) - sum(chunk) for chunk in chunks)

    assert padding(length_grouped_order(lengths, 8, 0, 0)) < 0.05 * padding(list(range(400)))


def test_epochs_differ_and_a_resumed_epoch_is_the_same() -> None:
    lengths = [(37 * n) % 101 + 1 for n in range(64)]
    sampler = LengthGroupedSampler(lengths, batch_size=4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    resumed = LengthGroupedSampler(lengths, batch_size=4, seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second != first and len(resumed) == 64
