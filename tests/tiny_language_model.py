"""A tiny random language model, its byte tokenizer and chat template, for tests of whole verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, two chat tokens, end of turn as end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


def tiny_model(kind: str = "llama", seed: int = 0) -> Any:
    """Two layers, width 32, sharp enough that greedy answers depend on the prompt."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config: Any = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=512)
        model: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.config.eos_token_id = model.config.bos_token_id = None
    return model.eval()


def save_tiny_base(path: Path, seed: int = 0) -> Path:
    """The Llama and its tokenizer as a local model directory."""
    tiny_model(seed=seed).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
