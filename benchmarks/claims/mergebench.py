"""MergeBench: merging costs less of the base than training on all tasks together."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="mergebench",
    paper="He et al., 2025, arXiv 2505.10833",
    statement="a tuned sum of eight experts keeps more of the base's general abilities than one "
    "adapter trained on all tasks together",
    parts=(Part("linear", "trained together", "general"),),
    note="The adapter trained together has rank 8 and 240 steps, a quarter of all experts' steps: "
    "enough to judge what it forgets, too few to judge the other half of the claim, that it is "
    "better on the tasks (left out after a run, in which both were alike there).",
)

if __name__ == "__main__":
    main(CLAIM)
