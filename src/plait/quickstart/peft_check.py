"""Does PEFT load what Plait exported, and answer the same?"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Of logits in float32: two libraries add the same numbers up in another order."""


@torch.no_grad()
def compare_with_peft(
    model: Any, tokenizer: Any, folders: Mapping[str, Path], rows: Path, count: int = 4
) -> dict[str, Any]:
    """{adapter: largest |difference| of logits between Plait and PEFT} over a few prompts.

    `model` carries the adapters of these names. Without PEFT the result says so.
    """
    if find_spec("peft") is None:
        return {"peft": None, "note": "PEFT is not installed; pip install peft to compare."}
    batch = _batch(tokenizer, rows, count)
    ours = {name: _ours(model, name, batch) for name in folders}
    theirs = _theirs(model, folders, batch)
    differences = {n: float((ours[n] - theirs[n]).abs().max()) for n in folders}
    largest = max(float(t.abs().max()) for t in theirs.values())
    return {
        "peft": version("peft"),
        "differences": differences,
        "largest_logit": largest,
        "passed": max(differences.values()) <= TOLERANCE * largest,
    }


def _batch(tokenizer: Any, rows: Path, count: int) -> dict[str, Tensor]:
    from plait.training.data import read_jsonl

    examples = [e for e, _ in zip(read_jsonl(rows), range(count), strict=False)]
    texts = [" ".join(m.content for m in e.chat()) for e in examples]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def _ours(model: Any, name: str, batch: Mapping[str, Tensor]) -> Tensor:
    import plait

    plait.activate(model, name)
    logits = model(**batch).logits
    plait.activate(model, {})
    return _of_tokens(logits, batch)


def _of_tokens(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return logits.float()[batch["attention_mask"].bool()]


def _theirs(
    model: Any, folders: Mapping[str, Path], batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """PEFT wraps a model of its own, made from the same weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    twin.load_state_dict(model.state_dict())
    names = list(folders)
    wrapped = PeftModel.from_pretrained(twin, folders[names[0]], adapter_name=names[0]).eval()
    for name in names[1:]:
        wrapped.load_adapter(folders[name], name)
    found = {}
    for name in names:
        wrapped.set_adapter(name)
        found[name] = _of_tokens(wrapped(**batch).logits, batch)
    return found
