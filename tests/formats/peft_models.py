"""Tiny real models, PEFT adapters with random weights on them, and the comparison of logits."""

import copy
import warnings
from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import plait

IDS = torch.arange(24).reshape(2, 12) % 60


def llama(tie: bool = False, classify: bool = False, bias: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        attention_bias=bias,
        pad_token_id=0,
        num_labels=3,
    )
    made = LlamaForSequenceClassification(config) if classify else LlamaForCausalLM(config)
    return spread(made)


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return spread(GPT2LMHeadModel(config))


def moe() -> nn.Module:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return spread(Qwen3MoeForCausalLM(config))


def spread(model: nn.Module) -> nn.Module:
    """Weights and biases away from their starts, so that every one of them shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def peft_model(base: nn.Module, config: peft.PeftConfig) -> PeftModel:
    """PEFT's model around a copy of `base`, its trained tensors random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def saved_by_peft(base: nn.Module, config: peft.PeftConfig, path: Path) -> Tensor:
    """Save such an adapter; the logits that PEFT gives with it after loading it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(base, config)
        model.save_pretrained(path)
        again = loaded_by_peft(base, path)
        assert torch.allclose(again, logits(model), atol=1e-5)
    return again


def loaded_by_peft(base: nn.Module, path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(copy.deepcopy(base), path))


def check_both_ways(base: nn.Module, config: peft.PeftConfig, path: Path, rtol: float = 1e-5):
    """PEFT's folder gives PEFT's logits in Plait, and what Plait writes gives them in PEFT."""
    expected = saved_by_peft(base, config, path / "theirs")
    plain = logits(base)
    adapter = plait.load(base, path / "theirs")
    close(logits(base), expected, rtol)
    assert (expected - plain).abs().max() > 1e-2  # the adapter does something
    adapter.save(path / "ours", format="peft")
    plait.detach(base)
    assert torch.equal(logits(base), plain)
    close(loaded_by_peft(base, path / "ours"), expected, rtol)
    again = plait.load(base, path / "ours", "again")
    close(logits(base), expected, rtol)
    again.save(path / "own")
    plait.detach(base)
    plait.load(base, path / "own")
    close(logits(base), expected, rtol)
    return adapter


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-5) -> None:
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error <= rtol, f"relative error {error:.2e}"


def check_in_peft(
    folder: Path, method: str, options: dict, *, moved: float = 1e-2, **where: object
) -> None:
    """An adapter of ours with random weights, saved for PEFT, gives PEFT's model our logits."""
    base = llama()
    adapter = plait.attach(base, method, **where, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = logits(base)
    adapter.save(folder, format="peft")
    plait.detach(base)
    assert (logits(base) - expected).abs().max() > moved
    close(loaded_by_peft(base, folder), expected, 2e-5)
