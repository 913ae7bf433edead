"""Merge files as mergekit's users write them, run as they are, against dense float64 formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_models import gradient, layer_of, loaded, names, write_model
from torch import Tensor

from plait.merging.recipes import merge_recipe

TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLERP = """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
STACK = """
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources: # add middle layers with residuals scaled to zero
    - model: garage-bAInd/Platypus2-13B
      layer_range: [16, 28]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
"""
LINEAR = """
merge_method: linear
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: [1, 0.25, 0]
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight:
        - filter: lm_head
          value: 0.6
        - filter: self_attn
          value: [0, 1]
        - value: 0.5
dtype: bfloat16
"""
DARE = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
  - model: EmbeddedLLM/Mistral-7B-Merge-14-v0.2
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
"""
ORCA, PLATYPUS, WIZARD = (
    "psmathur/orca_mini_v3_13b",
    "garage-bAInd/Platypus2-13B",
    "WizardLM/WizardMath-13B-V1.0",
)
LLAMA, MISTRAL = "TheBloke/Llama-2-13B-fp16", "mistralai/Mistral-7B-v0.1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(
    folder: Path, layers: int, base: str, *others: str, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Tensor]]:
    """A base and fine-tunes of it, under their names; what a merge in `dtype` reads, in float64."""
    made = {base: write_model(folder / base, 0, layers)}
    for i, name in enumerate(others, 1):
        made[name] = write_model(folder / name, i, layers, of=made[base])
    return {name: {n: t.to(dtype).double() for n, t in m.items()} for name, m in made.items()}


def run(here: Path, text: str, **options: object) -> dict[str, Tensor]:
    (here / "recipe.yml").write_text(text)
    return loaded(merge_recipe(here / "recipe.yml", here / "out", **options).path)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=step, atol=step * 1e-2)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The largest entries; in half precision several can be as large as the least of them."""
    sizes = delta.abs().flatten().sort(descending=True).values
    least = sizes[max(1, int(density * delta.numel() + 1e-9)) - 1]
    return torch.where(delta.abs() >= least, delta, 0)


def test_ties_with_gradients_and_filters(here: Path) -> None:
    m = write(here, 40, LLAMA, ORCA, PLATYPUS, WIZARD, dtype=torch.float16)
    found = run(here, TIES)
    assert set(found) == set(names(40))
    for name, tensor in found.items():
        base = m[LLAMA][name]
        densities = [gradient([1, 0.7, 0.1], name, 40), 0.5, 0.33]
        weights = [1.0, gradient([0, 0.3, 0.7, 1], name, 40), 0.5 if "mlp" in name else 0.0]
        models = (ORCA, PLATYPUS, WIZARD)
        parts = [trimmed(m[k][name] - base, d) for k, d in zip(models, densities, strict=True)]
        stacked = torch.stack(parts)
        w = torch.tensor(weights).double().view(-1, *[1] * base.dim())
        mass = (w * stacked).sum(0)
        agree = (stacked.sign() == torch.where(mass >= 0, 1.0, -1.0)) & (stacked != 0)
        total = (w * agree).sum(0)
        mean = (w * stacked * agree).sum(0) / torch.where(total > 0, total, 1.0)
        close(tensor, base + mean, torch.float16)
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and config["num_hidden_layers"] == 40


def test_slerp_with_t_by_filter_and_layer(here: Path) -> None:
    one, two = "OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"
    m = write(here, 32, one, two, dtype=torch.float16)
    m[two] = {n: t.half().double() for n, t in write_model(here / "other", 9, 32).items()}
    (here / two / "model.safetensors").write_bytes(
        (here / "other" / "model.safetensors").read_bytes()
    )
    for name, tensor in run(here, SLERP).items():
        t = 0.5
        if "self_attn" in name:
            t = gradient([0, 0.5, 0.3, 0.7, 1], name, 32)
        elif "mlp" in name:
            t = gradient([1, 0.5, 0.7, 0.3, 0], name, 32)
        a, b = m[one][name], m[two][name]
        angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
        wanted = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        close(tensor, wanted, torch.float16)


def test_stacked_layers_with_scaled_residuals(here: Path) -> None:
    m = write(here, 40, ORCA, PLATYPUS, dtype=torch.float16)
    found = run(here, STACK)
    taken = [(ORCA, i, False) for i in range(24)]
    taken += [(PLATYPUS, i, True) for i in range(16, 28)]
    taken += [(PLATYPUS, i, False) for i in range(20, 40)]
    assert set(found) == set(names(len(taken)))
    for name, tensor in found.items():
        layer = layer_of(name)
        if layer is None:
            source = ORCA if "embed" in name else PLATYPUS
            wanted = m[source][name]
        else:
            source, number, scaled = taken[layer]
            wanted = m[source][name.replace(f".{layer}.", f".{number}.", 1)]
            if scaled and ("o_proj" in name or "down_proj" in name):
                wanted = wanted * 0
        close(tensor, wanted, torch.float16)
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 56


def test_a_weighted_mean_with_gradients(here: Path) -> None:
    m = write(here, 40, ORCA, WIZARD, PLATYPUS, dtype=torch.bfloat16)
    for name, tensor in run(here, LINEAR).items():
        third = 0.5
        if "lm_head" in name:
            third = 0.6
        elif "self_attn" in name:
            third = gradient([0, 1], name, 40)
        w = np.array([gradient([1, 0.25, 0], name, 40), 0.3, third])
        w = w / w.sum()
        parts = [m[k][name] for k in (ORCA, WIZARD, PLATYPUS)]
        close(tensor, sum(x * p for x, p in zip(w, parts, strict=True)), torch.bfloat16)


def test_dare_ties_agrees_in_law(here: Path) -> None:
    """Over many entries: how many change, and how large the changes are together.

    The reference draws its masks with numpy, restores each tensor's sum of magnitudes (which is
    what `rescale` does in these files), elects signs and adds up what agrees.
    """
    others = [n.split(": ")[1].strip() for n in DARE.splitlines() if n.startswith("  - model")][1:]
    m = write(here, 8, MISTRAL, *others)
    found = run(here, DARE.replace("dtype: bfloat16", "dtype: float32"), seed=3)
    rng, weights = np.random.default_rng(0), np.array([0.4, 0.3, 0.3])

    def law(deltas: list[np.ndarray]) -> np.ndarray:
        parts = []
        for delta, w in zip(deltas, weights, strict=True):
            kept = delta * (rng.random(delta.shape) < 0.53)
            parts.append(w * kept * np.abs(delta).sum() / max(np.abs(kept).sum(), 1e-30))
        stacked = np.stack(parts)
        sign = np.where(stacked.sum(0) >= 0, 1, -1)
        return (stacked * (np.sign(stacked) == sign)).sum(0)

    drawn, own = [], np.zeros(2)
    deltas = {
        n: [(m[o][n] - m[MISTRAL][n]).numpy() for o in others] for n in names(8) if "norm" not in n
    }
    for _ in range(60):
        made = [law(d) for d in deltas.values()]
        drawn.append([sum((x != 0).sum() for x in made), sum(np.abs(x).sum() for x in made)])
    for name in deltas:
        change = found[name].double() - m[MISTRAL][name]
        big = change.abs() > 1e-6
        own += [int(big.sum()), float(change.abs().sum())]
    mean, spread = np.mean(drawn, 0), np.std(drawn, 0)
    assert np.all(np.abs(own - mean) < 5 * spread), (own, mean, spread)
    (here / "recipe.yml").write_text(DARE)
    again = loaded(merge_recipe(here / "recipe.yml", here / "b", seed=3, shard_size=9000).path)
    assert all(t.dtype == torch.bfloat16 for t in again.values())
    change = sum(float((again[n].double() - m[MISTRAL][n]).abs().sum()) for n in deltas)
    assert change == pytest.approx(own[1], rel=0.02)


def test_names_are_looked_up_in_a_mapping_first(here: Path) -> None:
    m = write(here, 4, "base", "a", "b")
    text = (
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        "  - {model: some/where@main, parameters: {weight: 0.5}}\n"
        "  - {model: b, parameters: {weight: 2}}\n"
    )
    found = run(here, text, models={"some/where@main": "a"})
    for name, tensor in found.items():
        close(tensor, 0.5 * m["a"][name] + 2 * m["b"][name], torch.float32)
