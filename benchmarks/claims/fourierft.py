"""FourierFT needs a fraction of LoRA's parameters for LoRA's quality."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="fourierft",
    paper="Gao et al., 2024, arXiv 2405.03003",
    statement="at a sixth of the parameters of LoRA r=8 FourierFT comes within 0.1 of its loss",
    task="digits-vit",
    contenders=(
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
        Contender(
            "fourierft",
            "fourierft",
            {"coefficients": 256, "scaling": 100.0, "start": "zeros"},
            rates=(1e-2, 3e-2, 1e-1, 3e-1),
        ),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "fourierft", "parameters")[0]
            / figures(found, "lora r=8", "parameters")[0],
            0.167,
            "FourierFT's parameters over LoRA's",
        ),
        compare(found, "fourierft", "lora r=8", margin=0.1),
    ),
    note="The paper starts from random coefficients, which on layers this narrow are no small "
    "change; here they start at zero.",
)

if __name__ == "__main__":
    main(CLAIM)
