"""LoRA-LEGO beats the mean, TIES and DARE."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="lora-lego",
    paper="Zhao et al., 2024, arXiv 2409.16167",
    statement="rank-1 units clustered across experts are more accurate than the mean, TIES and "
    "DARE",
    parts=(
        Part("lora-lego", "average"),
        Part("lora-lego", "ties"),
        Part("lora-lego", "dare"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
