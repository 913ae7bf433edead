"""AdapterTune's zero-initialised bottlenecks beat training the head alone by far."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

# AdapterTune sits on the blocks; "head alone" trains the classifier of the same frozen body.
CLAIM = Claim(
    slug="adaptertune",
    paper="Khazem, 2026 (AdapterTune)",
    statement="adapters on a frozen body gain at least 10 points of accuracy over the head alone, "
    "and beat full fine-tuning",
    task="digits-vit",
    contenders=(
        Contender("adaptertune", "adaptertune", {"rank": 16, "targets": r"network\.layers\.\d"}),
        Contender("head", "lora", {"rank": 10, "alpha": 10, "targets": [r"network.head"]}),
        Contender("full", "full", rates=(3e-4, 1e-3, 3e-3, 1e-2)),
    ),
    judge=lambda found: all_of(
        compare(found, "adaptertune", "head", "accuracy", margin=-0.1),
        compare(found, "adaptertune", "full", "accuracy"),
    ),
    note="The head is trained through a LoRA of full rank (10), which spans every change of it.",
)

if __name__ == "__main__":
    main(CLAIM)
