"""A tiny Llama, batches for it, and training: what tests of methods and statistics need."""

import torch
from torch import Tensor, nn

import plait


def llama(**changes) -> nn.Module:
    """A two-layer Llama of width 32 with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "use_cache": False,
        **changes,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():  # transformers' start (std 0.02) leaves logits too small to compare
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def batch(rows: int = 4, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Sequences that count upwards: easy to learn, unknown to a random model."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (rows, 1), generator=g)
    ids = (start + torch.arange(tokens)) % 64
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch(seed=seed)["input_ids"]).logits


def losses(model: nn.Module, adapter: "plait.Adapter", steps: int = 20, lr: float = 1e-2) -> list:
    """The loss before every one of `steps` AdamW steps on one batch, and after the last."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    data = batch(rows=8)
    found = []
    for _ in range(steps):
        loss = model(**data).loss
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*found, model(**data).loss.item()]


def scramble(adapter: "plait.Adapter", size: float = 0.1, seed: int = 5) -> None:
    """Noise on every trainable parameter, so that the adapter is somewhere in training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=g))
