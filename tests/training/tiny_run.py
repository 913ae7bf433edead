"""A base, a tokenizer and rows small enough to train in a test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plait.training.recipe import Recipe

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = [*DIGITS, "plus", "is"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_base(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def rows(count: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Sums of one to four digits, of several lengths."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        terms = [draw.randrange(3) for _ in range(draw.randrange(1, 5))]
        prompt = " plus ".join(WORDS[t] for t in terms) + " is "
        made.append({"prompt": prompt, "completion": WORDS[min(9, sum(terms))]})
    return made


def make_recipe(output: Path, **changes: Any) -> Recipe:
    values = {
        "output": str(output),
        "options": {"rank": 2, "dropout": 0.1},
        "template": False,
        "max_length": 16,
        "steps": 8,
        "batch_size": 4,
        "lr": 0.01,
        "log_every": 1,
        "save_every": 3,
        "show_examples": 0,
        "export": [],
        **changes,
    }
    return Recipe.make(values)
