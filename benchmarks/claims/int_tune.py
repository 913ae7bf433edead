"""IntTune beats LoRA with a small share of its parameters."""

from lab import Claim, Contender, at_most, compare, main
from lab.verdict import all_of


def judge(found):
    size = {name: side["parameters"] for name, side in found["contenders"].items()}
    share = size["int-tune"] / size["lora"]
    return all_of(compare(found, "int-tune", "lora"), at_most(share, 0.2, "parameters over LoRA's"))


CLAIM = Claim(
    slug="int-tune",
    paper="Guo et al., 2025, arXiv 2502.14482",
    statement="training NLoRA's middle matrix alone reaches a lower loss than LoRA",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 8, "alpha": 8}),
        Contender("int-tune", "int-tune", {"rank": 16}, rates=(3e-3, 1e-2, 3e-2, 1e-1)),
    ),
    judge=judge,
    note="The paper's share is 1.25 %, at 4096 features a side; 64 features cannot go so low.",
)

if __name__ == "__main__":
    main(CLAIM)
