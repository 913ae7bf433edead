"""LoftQ's start is far closer to the unquantised model than quantising alone, at two bits."""

from pathlib import Path

import torch
from lab import Claim, at_most, main

import plait
from plait.initializers.loftq import Loftq
from plait.quantization import BlockQuantizer
from plait.training.bases import load_base

QUANTIZER = BlockQuantizer(width=2, block=64)
RANK, TOKENS = 64, 256
TEXTS = ("README.md", "CONTRIBUTING.md", "LICENSE")
"""English of this repository, of which every chunk of `TOKENS` tokens is scored."""


def measure(smoke: bool):
    """Mean loss a token of SmolLM2-135M: as it is, quantised, and quantised with LoftQ's pair."""
    root = Path(__file__).parents[2]
    text = "\n".join((root / name).read_text() for name in TEXTS)
    model, tokenizer = load_base("smollm2-135m", dtype="float32")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    chunks = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)[: 1 if smoke else None]
    found = {"base": loss(model, chunks)}
    sites = plait.find_sites(model, "all-linear", layers=[0] if smoke else None)
    weights = {site.path: site.weight().detach().clone() for site in sites}
    start = Loftq(QUANTIZER, base="replace")
    plait.attach(model, "lora", initializer=start, rank=RANK, seed=0, layers=[0] if smoke else None)
    found["loftq"] = loss(model, chunks)
    plait.detach(model)
    with torch.no_grad():
        for site in sites:
            site.base.weight.copy_(QUANTIZER.quantize(weights[site.path]))
    found["quantised"] = loss(model, chunks)
    found["share_of_gap"] = (found["loftq"] - found["base"]) / (found["quantised"] - found["base"])
    return found


@torch.no_grad()
def loss(model, chunks: torch.Tensor) -> float:
    losses = [float(model(input_ids=c[None], labels=c[None]).loss) for c in chunks]
    return sum(losses) / len(losses)


CLAIM = Claim(
    slug="loftq",
    paper="Li et al., 2023, arXiv 2310.08659",
    statement="with the base in two bits and pairs of rank 64, the loss at the start exceeds the "
    "unquantised model's by at most half of what quantising alone adds",
    measure=measure,
    judge=lambda found: at_most(
        found["measured"]["share_of_gap"], 0.5, "share of the gap that is left"
    ),
    note="SmolLM2-135M, NF2 codes in blocks of 64, five turns, on this repository's own prose.",
)

if __name__ == "__main__":
    main(CLAIM)
