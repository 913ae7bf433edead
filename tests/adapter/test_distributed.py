"""Two processes (gloo, CPU): DDP and FSDP2 train an attached adapter as one process would."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import plait
from plait.testing import tiny_llama

STEPS = 3
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def build(**options: Any) -> tuple[nn.Module, plait.Adapter]:
    """The same model and adapter in every process."""
    torch.manual_seed(0)
    model = tiny_llama().train()
    adapter = plait.attach(model, "lora", rank=2, seed=1, **options)
    with torch.no_grad():
        for delta in adapter.deltas.values():
            nn.init.constant_(delta.B, 0.05)
    return model, adapter


def batch() -> Tensor:
    return torch.arange(4 * 6).reshape(4, 6) % 32


def train(model: nn.Module, adapter: plait.Adapter, tokens: Tensor) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def single(**options: Any) -> dict[str, Tensor]:
    model, adapter = build(**options)
    losses = train(model, adapter, batch())
    assert losses[-1] < losses[0]
    return adapter.state_dict()


def spawn(work: Callable[..., None], folder: Path) -> dict[str, Tensor]:
    """Run `work(rank)` in two processes; what rank 0 saved."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_start, args=(work, port, str(folder)), nprocs=2, join=True)
    return torch.load(folder / "state.pt")


def _start(rank: int, work: Callable[..., None], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        state = work(rank)
        if rank == 0:
            torch.save(state, Path(folder) / "state.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _ddp(rank: int) -> dict[str, Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    model, adapter = build()
    wrapped = DistributedDataParallel(model)
    assert list(plait.adapters(wrapped)) == ["default"]
    train(wrapped, adapter, batch()[2 * rank : 2 * rank + 2])
    return adapter.state_dict()


def _sharded(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def _fsdp(rank: int) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    model, adapter = build()
    _sharded(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(isinstance(p, DTensor) for p in adapter.parameters())
    train(model, adapter, batch()[2 * rank : 2 * rank + 2])
    state = adapter.state_dict()
    assert not any(isinstance(t, DTensor) for t in state.values())
    return state


def _fsdp_two(rank: int) -> dict[str, Tensor]:
    """Another adapter was attached first; both are sharded, one trains, then both are asked."""
    model, _ = build()
    other = plait.attach(model, "lora", rank=3, name="b", seed=2)
    before = {k: t.clone() for k, t in plait.adapters(model)["default"].state_dict().items()}
    _sharded(model)
    train(model, other, batch()[2 * rank : 2 * rank + 2])
    after = plait.adapters(model)["default"].state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items())
    plait.activate(model, {"default": 0.5, "b": 1.0})
    with torch.no_grad():
        assert torch.isfinite(model(batch(), labels=batch()).loss)
    return other.state_dict()


def two_adapters_single() -> dict[str, Tensor]:
    model, _ = build()
    other = plait.attach(model, "lora", rank=3, name="b", seed=2)
    train(model, other, batch())
    return other.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "alone"),
    [(_ddp, single), (_fsdp, single), (_fsdp_two, two_adapters_single)],
    ids=["DDP", "FSDP2", "FSDP2 beside another adapter"],
)
def test_two_processes_train_as_one(
    work: Callable[..., Any], alone: Callable[..., Any], tmp_path: Path
) -> None:
    found, wanted = spawn(work, tmp_path), alone()
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert found[key].shape == tensor.shape
        torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-4, msg=key)
