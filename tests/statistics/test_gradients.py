import pytest
import torch
from torch import nn

import plait
import tiny
from plait.statistics import gradient_pass


def dense_gradients(model, sites, batch):
    """The oracle: ordinary autograd on the weights themselves, all at once."""
    weights = [s.weight() for s in sites]
    stored = [s.base.weight for s in sites]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    grads = torch.autograd.grad(model(**batch).loss, stored)
    return {
        s.path: (g.flatten(1) if g.dim() > 2 else (g if g.shape == w.shape else g.t())).float()
        for s, w, g in zip(sites, weights, grads, strict=True)
    }


def test_equals_autograd_on_a_llama():
    model = tiny.llama()
    sites = plait.find_sites(model, "all-linear")
    found = gradient_pass(model, sites, [tiny.batch()])
    want = dense_gradients(model, sites, tiny.batch())
    assert set(found) == set(want)
    for path, g in want.items():
        torch.testing.assert_close(found[path], g, rtol=1e-4, atol=1e-6)
        assert found[path].dtype == torch.float32 and found[path].device.type == "cpu"


def test_micro_batches_of_unequal_label_counts_equal_one_batch():
    model = tiny.llama()
    whole = tiny.batch(rows=4)
    whole["labels"][0, :9] = -100
    whole["labels"][1, 0] = -100  # a label that the shift drops anyway
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    sites = plait.find_sites(model, ["q_proj", "down_proj"])
    one, two = gradient_pass(model, sites, [whole]), gradient_pass(model, sites, parts)
    for path in one:
        torch.testing.assert_close(one[path], two[path], rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_is_left_out_and_none_at_all_is_an_error():
    model = tiny.llama()
    sites = plait.find_sites(model, ["q_proj"])
    empty = tiny.batch(seed=1)
    empty["labels"].fill_(-100)
    one = gradient_pass(model, sites, [tiny.batch()])
    two = gradient_pass(model, sites, [empty, tiny.batch()])
    for path in one:
        torch.testing.assert_close(one[path], two[path])
    with pytest.raises(plait.PlaitError, match="label"):
        gradient_pass(model, sites, [empty])


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.mix = nn.Conv1d(8, 4, 2)

    def forward(self, ids, labels):
        h = self.embed(ids).permute(0, 3, 1, 2)
        h = self.relu(self.norm(self.conv(h)))
        h = self.mix(h.flatten(2)).mean(-1)
        return type("Out", (), {"loss": nn.functional.cross_entropy(h, labels)})


def test_convolutions_embeddings_and_in_place_activations():
    model = Conv()
    batch = {"ids": torch.randint(11, (3, 5, 5)), "labels": torch.tensor([0, 1, 3])}
    sites = plait.find_sites(model, ["embed", "conv", "mix"])
    found = gradient_pass(model, sites, [batch])
    model.eval()
    for path, g in dense_gradients(model, sites, batch).items():
        torch.testing.assert_close(found[path], g, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_exactly_as_it_was():
    model = Conv().train()
    model.conv.bias.requires_grad_(False)
    model.norm.eval()
    model.mix.weight.grad = torch.ones_like(model.mix.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    batch = {"ids": torch.randint(11, (3, 5, 5)), "labels": torch.tensor([0, 1, 3])}
    torch.set_rng_state(random)
    gradient_pass(model, plait.find_sites(model, ["conv", "mix"]), [batch])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.mix.weight.grad, torch.ones_like(model.mix.weight))
    assert model.embed.weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_the_model_is_put_back_when_a_batch_fails():
    model = tiny.llama().train()
    with pytest.raises(plait.PlaitError, match="loss"):
        sites = plait.find_sites(model, ["q_proj"])
        gradient_pass(model, sites, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_active_adapters_are_left_out_and_active_again_afterwards():
    model = tiny.llama()
    sites = plait.find_sites(model, ["v_proj"])
    want = gradient_pass(model, sites, [tiny.batch()])
    tiny.scramble(plait.attach(model, "lora", rank=2))
    adapted = tiny.logits(model)
    found = gradient_pass(model, sites, [tiny.batch()])
    assert all(torch.equal(found[p], want[p]) for p in want)
    torch.testing.assert_close(tiny.logits(model), adapted)


def test_a_loss_of_ones_own_weighs_batches_equally():
    model = tiny.llama()
    sites = plait.find_sites(model, ["o_proj"])

    def loss(model, batch):
        return model(input_ids=batch["input_ids"]).logits.square().mean()

    a, b = tiny.batch(rows=1), tiny.batch(rows=3, seed=1)
    each = [gradient_pass(model, sites, [x], loss) for x in (a, b)]
    both = gradient_pass(model, sites, [a, b], loss)
    for path in both:
        torch.testing.assert_close(both[path], (each[0][path] + each[1][path]) / 2)


def test_a_module_used_twice_adds_both_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 5)

        def forward(self, x):
            return type("Out", (), {"loss": self.lin(torch.tanh(self.lin(x))).square().sum()})

    model = Twice()
    x = torch.randn(3, 5)
    found = gradient_pass(model, plait.find_sites(model, ["lin"]), [{"x": x}])
    want = torch.autograd.grad(model(x).loss, model.lin.weight)[0]
    torch.testing.assert_close(found["lin"], want)


def test_an_input_overwritten_in_place_is_refused():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.second(x) + self.first(x)
            x.add_(1)
            return type("Out", (), {"loss": h.sum()})

    model = Overwrites()
    with pytest.raises(plait.PlaitError, match="overwritten"):
        gradient_pass(model, plait.find_sites(model, ["first"]), [{"x": torch.randn(2, 4)}])


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny.llama()
    sites = plait.find_sites(model, ["q_proj", "gate_proj"])
    want = gradient_pass(model, sites, [tiny.batch()])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    found = gradient_pass(model, sites, [tiny.batch()])
    for path in want:
        torch.testing.assert_close(found[path], want[path])


def test_packed_experts_take_their_own_gradient_and_keep_an_old_one():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_experts = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x):
            h = torch.einsum("bi,eoi->beo", x, self.up_experts)
            return type("Out", (), {"loss": h.square().mean()})

    model = Experts()
    x = torch.randn(6, 4)
    want = torch.autograd.grad(model(x).loss, model.up_experts)[0]
    old = model.up_experts.grad = torch.ones(3, 5, 4)
    model.up_experts.requires_grad_(False)
    sites = plait.find_sites(model, ["up_experts"])
    found = gradient_pass(model, sites, [{"x": x}, {"x": x}])
    torch.testing.assert_close(found["up_experts"], want)
    assert model.up_experts.grad is old and not model.up_experts.requires_grad
    assert not model.up_experts._post_accumulate_grad_hooks
