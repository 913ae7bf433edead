"""Leaving out logits at positions without a label changes neither the loss nor its gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.training.head import labelled_positions


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).double()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (3, 12))
    labels = ids.clone()
    for row, prompt in enumerate((5, 7, 6)):
        labels[row, :prompt] = -100
    labels[1, 10:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def run(model: LlamaForCausalLM, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss, [p.grad.clone() for p in model.parameters()], output.logits.shape[1]


@pytest.mark.parametrize("items", [None, 9])
def test_loss_and_gradients_are_the_same(model, items):
    inputs = batch()
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    loss, gradients, full = run(model, inputs)
    short_loss, short_gradients, short = run(model, labelled_positions(model, inputs))
    assert short == 7 < full  # positions 4 to 10 predict a labelled token in some row
    torch.testing.assert_close(short_loss, loss)
    torch.testing.assert_close(short_gradients, gradients)


def test_a_model_that_cannot_is_left_alone():
    inputs = batch()
    assert labelled_positions(torch.nn.Linear(2, 2), inputs) is inputs


def test_a_batch_with_labels_nearly_everywhere_is_left_alone(model):
    inputs = batch()
    inputs["labels"] = inputs["input_ids"]
    assert labelled_positions(model, inputs) is inputs
