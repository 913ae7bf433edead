"""Adapters beat LoRA on a spectrogram-like transformer, and the convolution adapter is the best."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

SITES = {"targets": r"network\.layers\.\d"}

CLAIM = Claim(
    slug="ast-petl",
    paper="Cappellazzo et al., 2023, arXiv 2312.03694",
    statement="at no more parameters, the convolution adapter ends at a lower loss than LoRA and "
    "than the bottleneck adapter",
    task="digits-vit",
    contenders=(
        Contender("conformer", "ast-petl", {**SITES, "rank": 8, "kernel": 5}),
        Contender("bottleneck", "ast-petl", {**SITES, "block": "bottleneck", "rank": 14}),
        Contender("lora", "lora", {"rank": 2, "alpha": 4}),
    ),
    judge=lambda found: all_of(
        compare(found, "conformer", "lora"),
        compare(found, "conformer", "bottleneck"),
        at_most(
            figures(found, "conformer", "parameters")[0] / figures(found, "lora", "parameters")[0],
            1.0,
            "the convolution adapter's parameters over LoRA's",
        ),
    ),
    note="Pictures of 16 patches in reading order stand for spectrograms; adapters stand beside "
    "whole blocks.",
)

if __name__ == "__main__":
    main(CLAIM)
