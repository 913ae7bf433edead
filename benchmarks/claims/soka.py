"""SoKA's start at W's principal Kronecker terms beats a random Kronecker start, and PiSSA."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="soka",
    paper="Chong, Qu, 2025, arXiv 2506.15251",
    statement="with about as many parameters SoKA ends at a lower loss than LoKr and than PiSSA",
    task="digits-vit",
    contenders=(
        Contender("soka", "soka", {"terms": 1}),
        Contender("lokr", "lokr", {"rank": 1000, "alpha": 1000}),
        Contender("pissa r=1", "lora", {"rank": 1, "alpha": 1}, initializer="pissa"),
    ),
    judge=lambda found: all_of(compare(found, "soka", "lokr"), compare(found, "soka", "pissa r=1")),
    note="One Kronecker term: 128 or 256 numbers a site for SoKA and LoKr, 128 or 320 for PiSSA.",
)

if __name__ == "__main__":
    main(CLAIM)
