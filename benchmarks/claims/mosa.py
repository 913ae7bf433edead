"""MoSA's split and merge gets more out of the same adapter."""

from lab import Claim, Contender, compare, main

SITES = {"targets": r"network\.layers\.\d", "rank": 16}

CLAIM = Claim(
    slug="mosa",
    paper="Zhang et al., 2023, arXiv 2312.02923",
    statement="with few labels, an adapter trained as four sparse experts ends at a lower loss "
    "than the same adapter trained whole",
    task="digits-few",
    contenders=(
        Contender("mosa", "mosa", {**SITES, "experts": 4}),
        Contender("adapter", "mosa", {**SITES, "experts": 1}, rules=({"mosa": {"kl": 0.0}},)),
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=lambda found: compare(found, "mosa", "adapter", "accuracy"),
    note="Both have the same size after training. MoSA's consistency loss runs every batch twice, "
    "so its steps cost about double; steps, not time, are equal. Adapters stand beside whole "
    "blocks.",
)

if __name__ == "__main__":
    main(CLAIM)
