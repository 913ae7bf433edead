"""The model stays itself for those who know nothing of Plait: transformers, accelerate, torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import plait
from plait import PlaitError
from plait.testing import make_model, perturb, tiny_llama


def tokens() -> Tensor:
    return torch.arange(12).reshape(2, 6)


def added(model: nn.Module, **options: object) -> plait.Adapter:
    adapter = plait.attach(model, "lora", rank=2, seed=1, **options)
    perturb(adapter)
    return adapter


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_leaks_nothing_and_loads_as_the_base(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path / "before")
    added(model, targets=["embeddings", "all-linear"])
    model.save_pretrained(tmp_path / "attached")
    before = load_file(tmp_path / "before" / "model.safetensors")
    attached = load_file(tmp_path / "attached" / "model.safetensors")
    assert sorted(before) == sorted(attached)
    assert all(torch.equal(attached[k], t) for k, t in before.items())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_generate_runs_and_the_base_returns_after_detaching() -> None:
    model = tiny_llama(use_cache=True).eval()
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    base = model.generate(tokens(), **settings)
    adapter = plait.attach(model, "lora", rank=4, seed=1)
    assert torch.equal(model.generate(tokens(), **settings), base)
    perturb(adapter, size=1.0)
    adapted = model.generate(tokens(), **settings)
    assert not torch.equal(adapted, base)
    plait.fuse(model)
    assert torch.equal(model.generate(tokens(), **settings), adapted)
    plait.unfuse(model)
    plait.detach(model)
    assert torch.equal(model.generate(tokens(), **settings), base)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("warm", [False, True], ids=["first pass", "after other passes"])
def test_gradient_checkpointing_of_transformers_gives_the_same_gradients(
    dropout: float, warm: bool
) -> None:
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        model = tiny_llama().train()
        adapter = added(model, dropout=dropout)
        if warm:  # q, k and v have been seen to read one tensor, and run as a group since
            model(tokens())
            model(tokens())
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_forwards_may_pile_up_before_checkpointed_backwards() -> None:
    def gradients(on: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = tiny_llama().train()
        adapter = added(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first = model(tokens(), labels=tokens()).loss
        with torch.no_grad():
            model(tokens())  # an evaluation in between
        second = model(tokens().flip(1), labels=tokens()).loss
        first.backward()
        second.backward()
        return [p.grad for p in adapter.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)


def test_reentrant_checkpointing_works_with_input_gradients_enabled() -> None:
    torch.manual_seed(1)
    model = tiny_llama().train()
    adapter = added(model)
    model(tokens(), labels=tokens()).loss.backward()
    plain = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    for p in adapter.parameters():
        p.grad = None
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(tokens(), labels=tokens()).loss.backward()
    for a, p in zip(plain, adapter.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a)


def test_resizing_token_embeddings_needs_no_adapter_there() -> None:
    model = tiny_llama().eval()
    adapter = added(model)
    model.resize_token_embeddings(40)
    assert model(tokens()).logits.shape == (2, 6, 40) and len(adapter.deltas) == 14


# -- accelerate ------------------------------------------------------------------------------------


def test_accelerate_hooks_put_on_before_attaching_run_the_adapter() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model("linear")
    x = torch.randn(3, 12)
    base = model(x).logits
    seen: list[str] = []

    class Spy(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> object:
            seen.append("pre")
            return args, kwargs

    hooks.add_hook_to_module(model.head, Spy())
    adapter = added(model, targets=["head"])
    wanted = make_model("linear")
    added(wanted, targets=["head"])
    assert torch.equal(model(x).logits, wanted(x).logits) and seen == ["pre"]
    assert not torch.equal(model(x).logits, base)
    plait.detach(model)
    assert torch.equal(model(x).logits, base) and len(seen) == 3
    assert adapter.model is None
    hooks.remove_hook_from_module(model.head)
    assert type(model.head) is nn.Linear and torch.equal(model(x).logits, base)


def test_accelerate_hooks_put_on_after_attaching_run_the_adapter() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model("linear")
    x = torch.randn(3, 12)
    added(model)
    adapted = model(x).logits
    hooks.add_hook_to_module(model.head, hooks.ModelHook())
    assert torch.equal(model(x).logits, adapted)
    hooks.remove_hook_from_module(model.head)
    assert torch.equal(model(x).logits, adapted)


def test_cpu_offloading_of_accelerate_moves_the_base_under_the_adapter() -> None:
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    model = make_model("linear")
    big_modeling.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    x = torch.randn(3, 12)
    added(model)
    wanted = make_model("linear")
    added(wanted)
    assert torch.equal(model(x).logits, wanted(x).logits)


def test_a_forward_replaced_by_a_stranger_is_refused_by_name() -> None:
    model = make_model("linear")
    model.head.forward = lambda x: x
    with pytest.raises(PlaitError, match=r"Linear.*forward replaced"):
        plait.attach(model, "lora", targets=["head"])


# -- compilers and wrappers ------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_compile_gives_the_same_outputs_and_gradients() -> None:
    model = tiny_llama(num_hidden_layers=1).eval()
    adapter = added(model)
    out = model(tokens()).logits
    wanted = torch.autograd.grad(out.square().sum(), list(adapter.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    got = compiled(tokens()).logits
    torch.testing.assert_close(got, out, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), list(adapter.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    plait_off = model(tokens()).logits
    torch.testing.assert_close(compiled(tokens()).logits, plait_off, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_sees_another_adapter_activated() -> None:
    model = make_model("linear")
    added(model)
    other = plait.attach(model, "lora", rank=3, name="b", seed=2, activate=False)
    perturb(other, 2)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 12)
    for active in ({"default": 1.0}, {"b": 1.0}, {"default": 0.5, "b": 2.0}, {}):
        plait.activate(model, active)
        wanted = model(x).logits
        torch.testing.assert_close(compiled(x).logits, wanted, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_a_wrapper_with_a_module_attribute_finds_the_model_s_adapters() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = make_model("linear")
    added(model)
    assert list(plait.adapters(Wrapper(model))) == ["default"]
    plait.activate(Wrapper(model), {})
    x = torch.randn(2, 12)
    assert torch.equal(model(x).logits, make_model("linear")(x).logits)


def test_autocast_runs_the_adapter_in_half_precision() -> None:
    model = make_model("linear")
    added(model)
    x = torch.randn(4, 12)
    full = model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x).logits
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)
    grads = [p.grad for p in plait.adapters(model)["default"].parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


def test_inference_mode_and_no_grad_give_the_same() -> None:
    model = tiny_llama().eval()
    added(model)
    wanted = model(tokens()).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, wanted)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens()).logits, wanted.clone())
    torch.testing.assert_close(model(tokens()).logits, wanted)
