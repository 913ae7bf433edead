"""SHiRA: masks, the sparse product and its sampled gradient, against dense oracles and PEFT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.adapter import SharedTensors
from plait.adapter.delta import Build
from plait.adapter.site import LinearSite
from plait.methods.shira import MaskFromGradient, ShiraDelta, ShiraOptions, draw, entries

MASKS = ("rand", "struct", "wm")


def linear(dtype=torch.float64, shape=(9, 6), **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    adapter = plait.attach(model, "shira", seed=2, **options)
    return model, adapter.deltas["0"], adapter


def mask_of(delta):
    mask = torch.zeros(delta.site.shape, dtype=torch.bool)
    mask.view(-1)[delta.indices.long()] = True
    return mask


@pytest.mark.parametrize("mask", MASKS)
def test_the_start_is_the_base_model_exactly(mask):
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "shira", rank=4, mask=mask)
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(9, 6), (5, 12)])
def test_forward_and_gradients_equal_the_dense_formula(mask, shape):
    model, delta, adapter = linear(shape=shape, rank=1, mask=mask)
    tiny.scramble(adapter, 0.5)
    x = torch.randn(3, 4, shape[0], dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, shape[1], dtype=torch.float64)
    want = F.linear(x, model[0].weight + delta.dense(), model[0].bias)
    got = model(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, [x, delta.values], g),
        torch.autograd.grad(want, [x, delta.values], g),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    dense = g.flatten(0, 1).T @ x.detach().flatten(0, 1)
    got = torch.autograd.grad(model(x), delta.values, g)[0]
    torch.testing.assert_close(got, dense.flatten()[delta.indices.long()])


def test_nothing_of_the_weights_size_is_made_in_backward():
    from torch.utils._python_dispatch import TorchDispatchMode

    model, _, adapter = linear(torch.float32, shape=(64, 64), density=0.01)
    tiny.scramble(adapter)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.layout == torch.strided:
                made.append(out.numel())
            return out

    x = torch.randn(3, 64, requires_grad=True)
    with Watch():
        model(x).sum().backward()
    # W itself passes as a transposed view; every other tensor is of the activations' size.
    assert sorted(n for n in made if n > 64 * 3) in ([], [4096], [4096] * 2, [4096] * 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
def test_structured_masks_have_the_declared_size(out, inputs, rank, seed):
    site = LinearSite("x", (out, inputs), nn.Linear(inputs, out))
    options = ShiraOptions(rank=rank, mask="struct")
    shared = SharedTensors(seed, torch.float32, torch.device("cpu"))
    delta = ShiraDelta(site, options, Build(seed, shared, torch.float32, torch.device("cpu")))
    budget = min(rank * (out + inputs), out * inputs)
    assert len(delta.indices) == len(delta.values) == entries(site, options) <= budget
    lines = mask_of(delta)
    whole = set(lines.all(1).nonzero().flatten().tolist()), lines.all(0).nonzero().flatten()
    for row, column in lines.nonzero().tolist():
        assert row == column or row in whole[0] or column in whole[1].tolist()


def test_structured_mask_with_a_diagonal_has_full_rank():
    _, delta, _ = linear(shape=(12, 12), rank=2, mask="struct")
    mask = mask_of(delta)
    assert mask.diagonal().all() and mask.all(1).any() and mask.all(0).any()
    with torch.no_grad():
        delta.values.copy_(torch.randn_like(delta.values))
    assert torch.linalg.matrix_rank(delta.dense()) == 12


def test_largest_weights_are_masked_by_wm():
    model, delta, _ = linear(density=0.2, mask="wm")
    W, mask = model[0].weight.abs(), mask_of(delta)
    assert mask.sum() == 11 and W[mask].min() >= W[~mask].max()
    assert "0.indices" in delta.state_dict() or "indices" in delta.state_dict()


def test_random_masks_are_uniform_distinct_and_from_the_seed():
    g = torch.Generator().manual_seed(0)
    hits = torch.zeros(50)
    for _ in range(2000):
        found = draw(50, 8, g)
        assert len(found.unique()) == 8 and (found.diff() > 0).all()
        hits[found] += 1
    assert float(((hits - 320) ** 2 / 320).sum()) < 90  # chi square, 49 degrees (0.84 of that)
    assert draw(50, 50, g).tolist() == list(range(50))
    _, a, adapter = linear(density=0.1)
    _, b, _ = linear(density=0.1)
    assert torch.equal(a.indices, b.indices) and set(adapter.state_dict()) == {"0.values"}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_same_trajectory_as_masked_training_in_place(optimizer):
    model, delta, adapter = linear(density=0.3)
    mask = mask_of(delta)
    W = model[0].weight.detach().clone().requires_grad_()
    ours = getattr(torch.optim, optimizer)(adapter.parameters(), lr=0.05, weight_decay=0.0)
    theirs = getattr(torch.optim, optimizer)([W], lr=0.05, weight_decay=0.0)
    for step in range(10):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(4, 9, dtype=torch.float64, generator=g)
        for run, opt in ((model, ours), (lambda x: F.linear(x, W, model[0].bias), theirs)):
            opt.zero_grad()
            run(x).square().sum().backward()
            if opt is theirs:
                W.grad.mul_(mask)
            opt.step()
    torch.testing.assert_close(model[0].weight + delta.dense(), W)
    assert torch.equal(W[~mask], model[0].weight[~mask])


def test_switching_restores_w_bit_for_bit():
    model, _, adapter = linear(torch.float32, density=0.2, name="a")
    other = plait.attach(model, "shira", density=0.2, name="b", seed=5)
    tiny.scramble(adapter), tiny.scramble(other, seed=6)
    W = model[0].weight.detach().clone()
    for name in ("a", "b", "a"):
        plait.activate(model, name)
        plait.fuse(model)
        assert not torch.equal(model[0].weight, W)
        plait.unfuse(model)
    assert torch.equal(model[0].weight, W)


def test_two_fused_adapters_keep_their_own_entries():
    model, a, _ = linear(torch.float32, density=0.2, name="a")
    other = plait.attach(model, "shira", density=0.2, name="b", seed=5)
    b, W = other.deltas["0"], model[0].weight.detach().clone()
    with torch.no_grad():
        a.values.fill_(1.0)
        b.values.fill_(-2.0)
    plait.activate(model, ["a", "b"])
    plait.fuse(model)
    change = model[0].weight.detach() - W
    mine, theirs = mask_of(a), mask_of(b)
    torch.testing.assert_close(change[mine & ~theirs], torch.ones(int((mine & ~theirs).sum())))
    torch.testing.assert_close(change[theirs & ~mine], torch.full_like(change[theirs & ~mine], -2))
    assert not change[~mine & ~theirs].any()


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_masks_from_gradients(mask):
    model = tiny.llama()
    sites = plait.find_sites(model, ["q_proj"])
    adapter = plait.attach(
        model,
        "shira",
        density=0.1,
        mask=mask,
        targets=["q_proj"],
        initializer=MaskFromGradient(),
        data=[tiny.batch()],
    )
    plait.detach(model)
    for site in sites:
        site.weight().requires_grad_()
    model(**tiny.batch()).loss.backward()
    for site in sites:
        score = site.weight().grad.abs()
        score = score * site.weight().detach().abs() if mask == "snip" else score
        chosen = mask_of(adapter.deltas[site.path])
        assert score[chosen].min() >= score[~chosen].max() * (1 - 1e-4)
    with pytest.raises(plait.PlaitError, match="MaskFromGradient"):
        plait.attach(tiny.llama(), "shira", mask=mask)


def test_a_gradient_mask_for_another_mask_or_method_is_refused():
    for method in ("shira", "lora"):
        with pytest.raises(plait.PlaitError, match="mask='grad'"):
            plait.attach(tiny.llama(), method, initializer=MaskFromGradient(), data=[tiny.batch()])


def test_options_are_checked():
    for wrong in ({"mask": "rnd"}, {"density": 0.0}, {"rank": 0}):
        with pytest.raises(plait.PlaitError):
            ShiraOptions(**wrong)


def test_bfloat16_base_and_convolutions():
    model, delta, adapter = linear(torch.bfloat16, density=0.3)
    tiny.scramble(adapter, 0.5)
    x = torch.randn(5, 9).bfloat16()
    want = F.linear(x.float(), model[0].weight.float() + delta.dense(), model[0].bias.float())
    got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    got.sum().backward()
    assert delta.values.grad.dtype == torch.float32
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    adapter = plait.attach(conv, "shira", density=0.2, targets=["0"])
    tiny.scramble(adapter, 0.5)
    kernel = conv[0].weight + adapter.deltas["0"].dense().view(4, 3, 3, 3)
    image = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(conv(image), F.conv2d(image, kernel, conv[0].bias))


@pytest.mark.parametrize("mask", MASKS)
def test_counts_and_training(mask):
    model = tiny.llama()
    adapter = plait.attach(model, "shira", rank=4, mask=mask, seed=0)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.8 * losses[0]


def test_logits_equal_peft():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "o_proj", "down_proj"]
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(model, "shira", rank=2, targets=targets)
    tiny.scramble(adapter, 0.2)
    theirs = peft.get_peft_model(other, peft.ShiraConfig(r=2, target_modules=targets)).eval()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            layer, flat = modules[path], delta.indices.long()
            layer.shira_weight["default"].copy_(delta.values)
            columns = delta.site.in_features
            layer.shira_indices["default"] = torch.stack([flat // columns, flat % columns]).int()
    want = theirs(input_ids=tiny.batch()["input_ids"]).logits
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-5, atol=1e-5)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == adapter.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_two_adapters_of_a_whole_model_restores_the_base_bitwise(dtype):
    """Live and fused, masks that overlap, steps of training between: every bit of W comes back."""
    model = tiny.llama().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = tiny.logits(model)
    for number, mask in enumerate(MASKS):
        adapter = plait.attach(model, "shira", density=0.3, mask=mask, name=mask, seed=number)
        tiny.scramble(adapter, 0.5, seed=number)
    outputs = {}
    for name in ("rand", "wm", "rand", "struct", "wm"):
        plait.activate(model, name)
        live = tiny.logits(model)
        plait.fuse(model)
        fused = tiny.logits(model)
        plait.unfuse(model)
        again = outputs.setdefault(name, (live, fused))
        assert torch.equal(again[0], live) and torch.equal(again[1], fused)
        assert not torch.equal(live, answer)
        now = model.state_dict()
        assert all(torch.equal(now[key], tensor) for key, tensor in base.items())
    model(**tiny.batch()).loss.backward()
    with torch.no_grad():
        for parameter in plait.adapters(model)["wm"].parameters():
            parameter -= 0.1 * parameter.grad
    plait.activate(model, {})
    assert torch.equal(tiny.logits(model), answer)
    plait.detach(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())


def folder_size(path):
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix != ".md")


def test_files_are_smaller_than_pefts_for_the_same_adapter(tmp_path):
    """8 bytes an entry against PEFT's 12, and 4 where the seed knows the positions."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "up_proj"]
    base = tiny.llama(hidden_size=96, intermediate_size=128)
    theirs = peft.get_peft_model(base, peft.ShiraConfig(r=8, target_modules=targets))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    wanted = theirs(input_ids=tiny.batch()["input_ids"]).logits
    model = tiny.llama(hidden_size=96, intermediate_size=128)
    adapter = plait.load(model, tmp_path / "theirs")
    adapter.save(tmp_path / "ours")
    plait.detach(model)
    plait.load(model, tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=1e-5, atol=1e-4)
    plait.detach(model)
    seeded = plait.attach(model, "shira", rank=8, targets=targets)
    assert seeded.num_parameters() == adapter.num_parameters()
    seeded.save(tmp_path / "seeded")
    entries_bytes = 4 * adapter.num_parameters()
    peft_size = folder_size(tmp_path / "theirs")
    assert peft_size > 3 * entries_bytes
    assert folder_size(tmp_path / "ours") < 0.7 * peft_size
    assert folder_size(tmp_path / "seeded") < 0.36 * peft_size


def test_every_mask_of_the_paper_trains_where_its_rule_says():
    """Rand, Struct, WM, Grad and SNIP: as many entries as asked for, and no two rules agree."""
    chosen = {}
    for mask in ("rand", "struct", "wm", "grad", "snip"):
        model = tiny.llama()
        start = {"initializer": MaskFromGradient(), "data": [tiny.batch()]}
        adapter = plait.attach(
            model,
            "shira",
            rank=4,
            mask=mask,
            targets=["down_proj"],
            seed=0,
            **(start if mask in ("grad", "snip") else {}),
        )
        delta = next(iter(adapter.deltas.values()))
        assert len(delta.indices.unique()) == len(delta.values) <= 4 * sum(delta.site.shape)
        losses = tiny.losses(model, adapter, steps=6)
        assert losses[-1] < losses[0]
        moved = delta.dense().flatten().nonzero().flatten()
        assert set(moved.tolist()) <= set(delta.indices.tolist())
        chosen[mask] = frozenset(delta.indices.tolist())
    assert len(set(chosen.values())) == 5
