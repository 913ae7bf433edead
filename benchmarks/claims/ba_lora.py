"""BA-LoRA learns from few, unbalanced and partly wrong labels better than LoRA and PiSSA."""

from dataclasses import replace

from lab import Claim, Contender, Verdict, compare, main
from lab.verdict import all_of

OPTIONS = {"rank": 8, "alpha": 8}
STRONG = {"consistency": 1e-1, "diversity": 3e-2, "svd": 1e-1}


def judge(found) -> Verdict:
    """By the paper's weights; what far stronger ones do is told beside it."""
    sides = [compare(found, "ba-lora", other, "accuracy") for other in ("pissa", "lora")]
    verdict = all_of(*sides)
    strong = compare(found, "ba-lora, strong", "pissa", "accuracy")
    return replace(verdict, reason=f"{verdict.reason} Strong weights: {strong.reason}")


CLAIM = Claim(
    slug="ba-lora",
    paper="Chang et al., 2024, arXiv 2408.04556",
    statement="trained on digits with a fifth of the labels wrong and half of the classes rare, "
    "BA-LoRA is more accurate on clean, balanced ones than PiSSA and LoRA",
    task="digits-noisy",
    contenders=(
        Contender("lora", "lora", OPTIONS),
        Contender("pissa", "lora", OPTIONS, initializer="pissa"),
        Contender("ba-lora", "lora", OPTIONS, initializer="pissa", rules=("ba-lora",)),
        Contender(
            "ba-lora, strong", "lora", OPTIONS, initializer="pissa", rules=({"ba-lora": STRONG},)
        ),
    ),
    judge=judge,
    note="The paper's weights of 1e-4 and 3e-4 are judged; the strong ones are 1000 and 100 times "
    "those. The base learned the task's digits upright and is no help with turned ones, so staying "
    "near it is less of a virtue than with a language model.",
)

if __name__ == "__main__":
    main(CLAIM)
