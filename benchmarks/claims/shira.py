"""SHiRA switches adapters five to sixteen times faster than LoRA fuses."""

import torch
from lab import Claim, cpu_seconds, main, paired_ratio
from lab.verdict import at_most
from torch import nn

import plait


def measure(smoke: bool):
    """CPU ms to fuse and take out an adapter of a 4096 x 4096 linear."""
    size, found = (256 if smoke else 4096), {}
    work = {}
    for method, options in (("shira", {"density": 0.01}), ("lora", {"rank": 32})):
        model = nn.Sequential(nn.Linear(size, size, bias=False)).requires_grad_(False)
        adapter = plait.attach(model, method, seed=0, **options)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_()

        def switch(model=model):
            plait.fuse(model)
            plait.unfuse(model)

        work[method] = switch
    seconds = cpu_seconds(work, rounds=3 if smoke else 15)
    found["lora_over_shira"] = paired_ratio(seconds, "lora", "shira")
    found |= {f"{name}_ms": 1e3 * sorted(s)[len(s) // 2] for name, s in seconds.items()}
    return found


CLAIM = Claim(
    slug="shira",
    paper="Bhardwaj et al., 2024, arXiv 2406.13175",
    statement="fusing and removing a 1 % SHiRA of a 4096 x 4096 matrix costs at most a fifth of "
    "fusing LoRA r=32",
    measure=measure,
    judge=lambda found: at_most(
        1 / found["measured"]["lora_over_shira"], 0.2, "SHiRA's switch over LoRA's"
    ),
    note="both are taken out exactly: LoRA's fuse makes a new weight and keeps the old one, "
    "SHiRA's writes its entries into W and keeps those that it overwrote.",
)

if __name__ == "__main__":
    main(CLAIM)
