"""A base model's structure without its weights: on the meta device, from the config alone."""

from __future__ import annotations

import os
from typing import Any


def skeleton(base: str) -> Any:
    """The model of a short name, folder or hub id; a second and a few MB, whatever its size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from plait.cli.common import quiet
    from plait.training.bases import get_base

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(os.fspath(get_base(base)))
        return AutoModelForCausalLM.from_config(config)
