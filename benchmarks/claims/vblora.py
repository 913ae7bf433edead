"""VB-LoRA stores a fraction of LoRA's numbers and keeps its quality."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

LAYERS, RANK, LENGTH, VECTORS, CHOSEN = 4, 4, 64, 48, 2
PIECES = LAYERS * RANK * (4 * (64 + 64) + 2 * (64 + 256)) // LENGTH
STORED = VECTORS * LENGTH + PIECES * (2 * CHOSEN - 1)
"""The bank, and of every piece k indices and k - 1 weights."""

CLAIM = Claim(
    slug="vblora",
    paper="Li, Han, Ji, 2024, arXiv 2405.15179",
    statement="storing an eighth of the numbers of LoRA r=8, VB-LoRA comes within 0.1 of its loss",
    task="digits-vit",
    contenders=(
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
        Contender(
            "vblora",
            "vblora",
            {"rank": RANK, "vectors": VECTORS, "length": LENGTH, "chosen": CHOSEN, "bound": 0.1},
        ),
    ),
    judge=lambda found: all_of(
        at_most(
            STORED / figures(found, "lora r=8", "parameters")[0],
            0.125,
            "numbers that VB-LoRA stores over LoRA's",
        ),
        compare(found, "vblora", "lora r=8", margin=0.1),
    ),
    note="In training every piece has 48 logits; the finished adapter needs its two largest.",
)

if __name__ == "__main__":
    main(CLAIM)
