"""Compacter does a bottleneck adapter's work with an eighth of its parameters."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

SITES = r"network\.layers\.\d"

CLAIM = Claim(
    slug="compacter",
    paper="Karimi Mahabadi et al., 2021, arXiv 2106.04647",
    statement="with about an eighth of the parameters of a bottleneck adapter of the same width, "
    "Compacter reaches its loss within 0.1",
    task="digits-vit",
    contenders=(
        Contender("compacter", "compacter", {"targets": SITES, "n": 4, "reduction": 4}),
        Contender("adapter", "adaptertune", {"targets": SITES, "rank": 16}),
    ),
    judge=lambda found: all_of(
        compare(found, "compacter", "adapter", margin=0.1),
        at_most(
            figures(found, "compacter", "parameters")[0]
            / figures(found, "adapter", "parameters")[0],
            0.125,
            "Compacter's parameters over the adapter's",
        ),
    ),
    note="Both stand after whole blocks, and no layer norm is trained; the paper compares on T5.",
)

if __name__ == "__main__":
    main(CLAIM)
