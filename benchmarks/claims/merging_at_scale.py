"""What matters for merging at scale: unseen tasks gain, and the plain mean is enough."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="merging-at-scale",
    paper="Yadav et al., 2024, arXiv 2410.03617",
    statement="the mean of eight experts is more accurate on unseen tasks than the base, and on "
    "the experts' own within 0.05 of task arithmetic, TIES and DARE-TIES",
    parts=(
        Part("average", "base", "held-out"),
        Part("average", "linear", margin=0.05),
        Part("average", "ties", margin=0.05),
        Part("average", "dare-ties", margin=0.05),
    ),
    note="The paper merges full models of 1 to 64 billion parameters and finds the methods alike "
    "only where models are large.",
)

if __name__ == "__main__":
    main(CLAIM)
