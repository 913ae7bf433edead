"""LoRA's updates are entangled unlike those of full tuning, but what attention does is alike."""

import itertools
import statistics

import torch
from lab import Claim, main
from lab.tasks import LAYERS, TASKS
from lab.verdict import CONTRADICTED, NOT_SHOWN, SHOWN, Verdict

import plait
from plait.linalg.entanglement import cut_entropy, entropy_profile

SIDES = {
    "lora": ("lora", {"rank": 4, "alpha": 4}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "mps": ("mps-adapter", {"rank": 8, "alpha": 8}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "full": (None, {}, (1e-4, 3e-4, 1e-3, 3e-3)),
}
SEEDS, STEPS, AGREE = (0, 1, 2), 200, 0.05
PROJECTIONS = ("q_proj", "v_proj")


def trained(method, options, rate, seed, steps):
    """The base adapted by a method, or wholly where that is None; its change at q and v."""
    task = TASKS["digits-vit"]
    model, base = task.fresh(), task.base()
    torch.manual_seed(seed)
    if method is None:
        sites = plait.find_sites(model, LAYERS)
        parameters = [site.weight() for site in sites]
    else:
        parameters = plait.attach(model, method, targets=LAYERS, seed=seed, **options).parameters()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    batches = task.batches(seed)
    for _ in range(steps):
        model.train()(**next(batches)).loss.backward()
        optimizer.step(), model.zero_grad()
    if method is not None:
        plait.fuse(model)
    changes = {
        path: model.get_parameter(f"{path}.weight") - base.get_parameter(f"{path}.weight")
        for path, _ in base.named_modules()
        if path.endswith(PROJECTIONS)
    }
    return model, changes


def attention_entropy(model) -> float:
    """Mean S of the query | key cut of every attention map on 32 test pictures."""
    kept, hooks = {}, []
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "k_proj")):
            keep = lambda _, __, out, path=path: kept.__setitem__(path, out)  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    data = TASKS["digits-vit"].splits()["test"]
    model.eval()(data["pixels"][:32])
    for hook in hooks:
        hook.remove()
    found = []
    for path in [p for p in kept if p.endswith("q_proj")]:
        q, k = (
            kept[p].unflatten(-1, (4, -1)).transpose(1, 2)
            for p in (path, path.replace("q_proj", "k_proj"))
        )
        maps = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        found.append(cut_entropy(maps).mean().item())
    return statistics.fmean(found)


@torch.no_grad()
def figures_of(model, changes) -> dict:
    profiles = torch.stack([entropy_profile(change) for change in changes.values()])
    return {"profile": profiles.mean(0).tolist(), "attention": attention_entropy(model)}


def measure(smoke: bool):
    """Per side, at the rate with the least mean validation loss: one profile of S and one attention
    entropy a seed."""
    task, found = TASKS["digits-vit"], {}
    for side, (method, options, rates) in SIDES.items():
        rates, seeds = (rates[:1], SEEDS[:1]) if smoke else (rates, SEEDS)
        runs = {}
        for rate, seed in itertools.product(rates, seeds):
            model, changes = trained(method, options, rate, seed, 5 if smoke else STEPS)
            loss = task.score(model, "validation")["loss"]
            runs.setdefault(rate, []).append((loss, figures_of(model, changes)))
        best = min(runs, key=lambda rate: statistics.fmean(run[0] for run in runs[rate]))
        found[side] = {"rate": best, "seeds": [figures for _, figures in runs[best]]}
    return found


def judge(outcome) -> Verdict:
    """A valley for LoRA and none for full tuning, and attention entropies within 5 %."""
    measured = outcome["measured"]
    dips = {side: [_dip(run["profile"]) for run in m["seeds"]] for side, m in measured.items()}
    attention = {
        side: statistics.fmean(run["attention"] for run in m["seeds"])
        for side, m in measured.items()
    }
    spread = max(attention.values()) / min(attention.values()) - 1
    valley = min(dips["lora"]) > 0 and min(dips["lora"]) > max(dips["full"])
    if valley and spread <= AGREE:
        verdict = SHOWN
    else:
        verdict = NOT_SHOWN if valley else CONTRADICTED
    means = ", ".join(f"{side} {statistics.fmean(d):+.2f}" for side, d in dips.items())
    return Verdict(
        verdict,
        f"dip of S at the row | column cut below its neighbours, in nats: {means}; attention "
        f"entropies differ by {100 * spread:.1f} % at most.",
    )


def _dip(profile) -> float:
    middle = len(profile) // 2
    return min(profile[middle - 1], profile[middle + 1]) - profile[middle]


CLAIM = Claim(
    slug="mps-adapter",
    paper="Chen et al., 2026, arXiv 2601.06788",
    statement="the entanglement entropy of LoRA's updates of q and v has a valley at the cut "
    "between rows and columns that full tuning's has not, while the entropies of attention agree",
    measure=measure,
    judge=judge,
    note="ViT (4 layers of 64) adapted to turned digits; sides of 64 are chains of six two-valued "
    "sites. Agreement means within 5 %.",
)

if __name__ == "__main__":
    main(CLAIM)
