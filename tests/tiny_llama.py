"""A two-layer Llama and twenty training steps on a small task, for the tests of methods."""

import torch

import plait


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    torch.manual_seed(11)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tokens(rows=8, length=12):
    """Rows that count upwards modulo 13: what comes next is decided by what stands there."""
    return (torch.arange(length) + 3 * torch.arange(rows)[:, None]) % 13


def train_losses(model, parameters, lr, steps=20):
    """The loss before every step; routers' losses are part of it."""
    ids = tokens()
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        (loss + plait.auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_loss_falls(method, lr=1e-2, by=0.05, **options):
    """Twenty steps on a fresh model must lower the loss by the share `by`."""
    model = tiny_llama()
    adapter = plait.attach(model, method, seed=1, **options)
    losses = train_losses(model, list(adapter.parameters()), lr)
    assert losses[-1] < (1 - by) * losses[0], f"{method}: {losses[0]:.3f} -> {losses[-1]:.3f}"
    return losses
