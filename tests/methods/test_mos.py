"""MoS: shards, pools and counts against an assembly written with loops."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 8)
        self.down = nn.Linear(8, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


OPTIONS = {"equivalent_rank": 2, "rank": 4, "private_rank": 1, "shards": 4}


def make(layers=3, seed=1, **options):
    model = Net(layers)
    return model, plait.attach(model, "mos", seed=seed, **{**OPTIONS, **options})


def perturb(adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))


def assembled(delta, side, size):
    """The layer's vectors, shard by shard."""
    pool = delta.shared[f"{side}_{delta.place.pool}"].detach()
    l = delta.options.shards
    width = pool.shape[1] // l
    index = getattr(delta, f"index_{side}").tolist()
    rows = []
    for k in range(delta.rank):
        pieces = []
        for number in index[k * l : (k + 1) * l]:
            row, shard = divmod(number, l)
            pieces.append(pool[row, shard * width : (shard + 1) * width])
        rows.append(torch.cat(pieces)[:size])
    return torch.stack(rows)


@pytest.mark.parametrize("shards", [1, 4, 5])  # 5 divides neither 8 nor 12
def test_change_is_the_product_of_the_assembled_vectors(shards):
    _, adapter = make(shards=shards)
    perturb(adapter)
    for delta in adapter.deltas.values():
        rows, columns = delta.site.shape
        A, B = assembled(delta, "A", columns), assembled(delta, "B", rows)
        wanted = 2.0 * B.t() @ A
        torch.testing.assert_close(delta.dense(), wanted, rtol=1e-5, atol=1e-5)
        x = torch.randn(3, columns)
        y = delta.site.forward(x) + x @ wanted.t()
        torch.testing.assert_close(delta.site.base(x), y, rtol=1e-5, atol=1e-5)


def test_start_is_the_base_in_bits():
    model, _ = make()
    x = torch.randn(4, 12)
    got = model(x)
    plait.activate(model, {})
    assert torch.equal(got, model(x))


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2}, {"shards": 2}, {"private_rank": 0, "rank": 6}, {"shards": 5}]
)
def test_count_does_not_depend_on_rank_or_privacy(options):
    _, adapter = make(**options)
    sites = [d.site for d in adapter.deltas.values()]
    pad = (15 + 10) if options.get("shards") == 5 else (12 + 8)
    assert adapter.num_parameters() == 2 * 3 * pad * 2
    assert plait.get_method("mos").count(sites, adapter.options) == 2 * 3 * pad * 2
    assert all(not list(d.parameters()) for d in adapter.deltas.values())


def test_unsharded_private_vectors_are_lora():
    model, adapter = make(shards=1, rank=2, private_rank=2)
    perturb(adapter)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    lora = plait.attach(plain, "lora", rank=2)
    for path, delta in adapter.deltas.items():
        low = delta.factors()
        lora.deltas[path].set_pair(low.A.detach(), low.B.detach())
        assert torch.equal(lora.deltas[path].dense(), delta.dense())
    x = torch.randn(4, 12)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    used = [set(d.index_A.tolist()) for p, d in adapter.deltas.items() if p.endswith("up")]
    assert used == [{0, 1}, {2, 3}, {4, 5}]


def test_no_shard_twice_in_a_layer_and_private_ones_in_one_layer_only():
    _, adapter = make()
    first_private = (2 - 1) * 3 * 4
    for kind in ("up", "down"):
        deltas = [d for p, d in adapter.deltas.items() if p.endswith(kind)]
        for side in ("index_A", "index_B"):
            tables = [getattr(d, side).tolist() for d in deltas]
            assert all(len(set(t)) == len(t) == 4 * 4 for t in tables)
            private = [{i for i in t if i >= first_private} for t in tables]
            assert all(len(p) == 4 for p in private)
            assert len(set.union(*private)) == 12
            public = [{i for i in t if i < first_private} for t in tables]
            assert public[0] & public[1]  # public shards are really shared


def test_A_and_B_are_drawn_independently_and_from_the_seed():
    _, first = make(seed=4)
    _, again = make(seed=4)
    _, other = make(seed=5)
    path = "layers.0.up"
    a, b, c = (x.deltas[path] for x in (first, again, other))
    assert torch.equal(a.index_A, b.index_A)
    assert torch.equal(a.index_B, b.index_B)
    assert not torch.equal(a.index_A, c.index_A)
    assert not torch.equal(a.index_A, a.index_B)
    assert torch.equal(a.shared["A_up_8x12"], b.shared["A_up_8x12"])


def test_gradient_of_a_shared_shard_is_the_sum_over_its_uses():
    model, adapter = make()
    perturb(adapter)
    x = torch.randn(5, 12)
    model(x).pow(2).sum().backward()
    pool = adapter.shared["A_up_8x12"]
    ups = [d for p, d in adapter.deltas.items() if p.endswith("up")]
    copies = {}
    for delta in ups:  # the same forward with every layer holding its own A
        low = delta.factors()
        copies[delta] = low.A.detach().clone().requires_grad_()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    h = x
    for layer, up in zip(plain.layers, ups, strict=True):
        down = adapter.deltas[up.site.path.replace("up", "down")].dense().detach()
        inner = layer.up(h) + 2 * (h @ copies[up].t()) @ up.factors().B.detach().t()
        inner = torch.tanh(inner)
        h = h + layer.down(inner) + inner @ down.t()
    h.pow(2).sum().backward()
    wanted = torch.zeros_like(pool).view(-1, 3)
    for delta in ups:
        for position, shard in enumerate(delta.index_A.tolist()):
            wanted[shard] += copies[delta].grad.view(-1, 3)[position]
    torch.testing.assert_close(pool.grad.view(-1, 3), wanted, rtol=1e-4, atol=1e-4)


def test_pool_starts_with_the_fan_in_of_the_whole_vector():
    _, adapter = make()
    pool = adapter.shared["A_up_8x12"]
    assert 0.8 / 12**0.5 < pool.abs().max() <= 1 / 12**0.5
    assert adapter.shared["B_up_8x12"].abs().sum() == 0


def test_export_and_fuse_give_the_same_outputs():
    model, adapter = make()
    perturb(adapter)
    x = torch.randn(4, 12)
    wanted = model(x)
    lora = adapter.to_lora()
    for path, delta in adapter.deltas.items():
        torch.testing.assert_close(lora.deltas[path].dense(), delta.dense())
    plait.fuse(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_only_the_pools_are_saved():
    _, adapter = make()
    assert set(adapter.state_dict()) == {
        f"shared:{side}_{kind}" for side in "AB" for kind in ("up_8x12", "down_12x8")
    }


def test_default_rank_is_eight_times_the_budget_or_what_the_pools_hold():
    _, few = make(layers=3, rank=None)
    assert few.deltas["layers.0.up"].rank == 1 + 3
    _, many = make(layers=20, rank=None)
    assert many.deltas["layers.0.up"].rank == 16


def test_impossible_options_are_refused():
    with pytest.raises(PlaitError, match="does not fit"):
        make(rank=5)
    with pytest.raises(PlaitError, match="private_rank"):
        make(private_rank=3)
    with pytest.raises(PlaitError, match="shared with other layers"):
        make(overrides={"layers.1.up": {"shards": 2}})


def test_an_override_may_change_the_active_rank():
    _, adapter = make(overrides={"layers.1.up": {"rank": 2}})
    assert adapter.deltas["layers.1.up"].rank == 2
    assert adapter.deltas["layers.0.up"].rank == 4


def test_loss_falls_on_a_tiny_llama():
    assert_loss_falls("mos", lr=0.02, equivalent_rank=4, shards=2)
