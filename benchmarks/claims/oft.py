"""OFT keeps the angles between neurons, and learns as LoRA does."""

import itertools

import torch
from lab import Claim, Contender, compare, main
from lab.tasks import TASKS
from lab.verdict import all_of, at_most
from torch import Tensor

import plait

SIDES = {
    "oft": ("oft", {"block_size": 8, "terms": None}, 1e-2),
    "lora": ("lora", {"rank": 2, "alpha": 2}, 1e-2),
}


def energy(W: Tensor) -> float:
    """The hyperspherical energy of W's rows: the mean of 1 / distance on the unit sphere."""
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    return (1 / torch.pdist(unit)).mean().item()


def measure(smoke: bool):
    """By how much training changes the energy of a site, as a share, at most over sites."""
    task, found = TASKS["digits-vit"], {}
    for side, (method, options, rate) in SIDES.items():
        model = task.fresh()
        adapter = plait.attach(model, method, targets=task.targets, seed=0, **options)
        run = plait.RuleStack(model, lr=rate)
        for batch in itertools.islice(task.batches(0), 5 if smoke else task.steps):
            model.train()(**batch).loss.backward()
            run.step()
        changes = []
        for delta in adapter.deltas.values():
            W = delta.site.weight().detach()
            changes.append(abs(energy(W + delta.dense().detach()) / energy(W) - 1))
        found[f"{side}_energy_change"] = max(changes)
    return found


CLAIM = Claim(
    slug="oft",
    paper="Qiu et al., 2023, arXiv 2306.07280",
    statement="OFT changes the hyperspherical energy of no layer by more than 1e-5 where LoRA "
    "changes it a thousand times as much, and comes within 0.05 of the loss of LoRA of the same "
    "size",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 2}),
        Contender("oft", "oft", {"block_size": 8}),
    ),
    measure=measure,
    judge=lambda found: all_of(
        at_most(found["measured"]["oft_energy_change"], 1e-5, "OFT's change of the energy"),
        at_most(
            found["measured"]["oft_energy_change"] / found["measured"]["lora_energy_change"],
            1e-3,
            "OFT's change over LoRA's",
        ),
        compare(found, "oft", "lora", margin=0.05),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
