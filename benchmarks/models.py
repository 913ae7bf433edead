"""The base models that the benchmarks time: a six-layer one shaped like SmolLM2, and the real
thing."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from plait.training.bases import get_base


def six_layers(dtype: torch.dtype) -> LlamaForCausalLM:
    """Six SmolLM2-135M layers (576 wide) under a vocabulary of 4,096, random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def smollm2(dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct with its 49,152 words."""
    model = LlamaForCausalLM.from_pretrained(get_base("smollm2-135m"), dtype=dtype)
    model.config.use_cache = False
    return model


MODELS = {"six-layer": six_layers, "smollm2": smollm2}


def frozen(model: nn.Module) -> nn.Module:
    """Freeze the base; activations still carry gradients, as under any adapter."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same weights, so that comparing costs no second copy."""
    memo = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def random_batch(model: nn.Module, rows: int = 8, tokens: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}
