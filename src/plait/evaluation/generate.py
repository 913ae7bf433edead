"""Greedy answers to many prompts: batches of similar length, padded on the left, KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from plait.evaluation.rows import Voices, answering, grouped

Advance = Callable[[int], None]


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    special_tokens: bool = False,
    voices: Voices | None = None,
    advance: Advance = lambda done: None,
) -> list[str]:
    """The model's most likely continuation of each prompt, up to its end-of-turn token.

    `special_tokens` lets the tokenizer add its own (for prompts that no chat template made).
    `voices` names the adapter that answers each prompt (None: the base), all in one pass.
    `advance` is called with the number of prompts done. Order and padding do not change an answer
    (but for rounding).
    """
    encoded = [tokenizer(p, add_special_tokens=special_tokens)["input_ids"] for p in prompts]
    answers = [""] * len(prompts)
    with greedy_config(model, tokenizer, max_new_tokens), torch.inference_mode():
        for batch in batches_by_length([len(ids) for ids in encoded], batch_size):
            chosen = grouped(batch, voices)
            ids, mask = pad_left([encoded[i] for i in chosen], pad_token(tokenizer))
            with answering(model, None if voices is None else [voices[i] for i in chosen]):
                out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
            advance(len(chosen))
    return answers


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first (a lack of memory shows at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [batch, longest]."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_token(tokenizer: Any) -> int:
    """The padding token's id; any will do under the mask, so 0 where there is none."""
    for name in ("pad_token_id", "eos_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            return int(value)
    return 0


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's own and the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = list(found) if isinstance(found, list | tuple) else [found]
    ends.append(getattr(tokenizer, "eos_token_id", None))
    return sorted({int(e) for e in ends if e is not None})


@contextlib.contextmanager
def greedy_config(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Within, `model.generate` is greedy and nothing else.

    The model's own configuration is set aside as a whole: `generate` fills from there what another
    leaves open, and a published model's repetition penalty would change what is measured.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=pad_token(tokenizer),
    )
    try:
        yield
    finally:
        model.generation_config = before
