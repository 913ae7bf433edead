"""kohya's and diffusers' files: names resolved by the model, scale from alpha, both ways."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import plait
from plait.errors import FormatError, PlaitError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x):
        return self.to_out[0](torch.tanh(self.to_q(x)))


class UNet(nn.Module):
    """A convolution and an attention, in a diffusion model's way of naming."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])
        self.proj = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv_in(x)
        y = self.down_blocks[0]["attn1"](x.flatten(2).mT).mT.reshape(x.shape)
        return self.proj(torch.relu(x + y))


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.q_proj(x)


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = UNet(), TextModel()

    def forward(self, x):
        return self.unet(x) + self.text_encoder(torch.ones(4)).sum()


X = torch.linspace(-1, 1, 3 * 5 * 5).reshape(1, 3, 5, 5)
SHAPES = {
    "conv_in": ((2, 3, 3, 3), (8, 2, 1, 1)),
    "down_blocks.0.attn1.to_q": ((2, 8), (8, 2)),
    "down_blocks.0.attn1.to_out.0": ((3, 8), (8, 3)),
    "proj": ((2, 8, 1, 1), (8, 2, 1, 1)),
}
SCALES = {"conv_in": 0.5, "down_blocks.0.attn1.to_q": 2.0, "proj": 1.5}


def factors() -> dict:
    return {p: (torch.randn(a), torch.randn(b)) for p, (a, b) in SHAPES.items()}


def by_hand(model: UNet, pairs: dict, scales: dict) -> torch.Tensor:
    """The output with scale * up @ down written into a copy of the weights."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for path, (down, up) in pairs.items():
            weight = changed.get_submodule(path).weight
            product = up.flatten(1) @ down.flatten(1)
            weight += scales.get(path, 1.0) * product.reshape(weight.shape)
        return changed(X)


def close(got, wanted):
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def kohya(pairs: dict, scales: dict, prefix: str = "lora_unet") -> dict:
    tensors = {}
    for path, (down, up) in pairs.items():
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if path in scales:
            tensors[f"{name}.alpha"] = torch.tensor(scales[path] * len(down))
    return tensors


TEXT = {
    "lora_te_q_proj.lora_down.weight": torch.ones(1, 4),
    "lora_te_q_proj.lora_up.weight": torch.ones(4, 1),
}


def test_kohya_is_read(tmp_path):
    model, pairs = UNet(), factors()
    save_file(kohya(pairs, SCALES), tmp_path / "style.safetensors")
    adapter = plait.load(model, tmp_path / "style.safetensors")
    assert adapter.name == "style" and set(adapter.deltas) == set(SHAPES)
    with torch.no_grad():
        close(model(X), by_hand(copy_of(model), pairs, SCALES))


def copy_of(model: UNet) -> UNet:
    fresh = UNet()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_parts_that_the_model_is_not_are_left_out_with_a_warning(tmp_path):
    model, pairs = UNet(), factors()
    save_file(kohya(pairs, SCALES) | TEXT, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="1 sites of 'lora_te' are left out"):
        adapter = plait.load(model, tmp_path / "a.safetensors")
    assert set(adapter.deltas) == set(SHAPES)


def test_a_pipeline_takes_every_part(tmp_path):
    model = Pipeline()
    save_file(kohya(factors(), SCALES) | TEXT, tmp_path / "a.safetensors")
    adapter = plait.load(model, tmp_path / "a.safetensors")
    assert set(adapter.deltas) == {f"unet.{p}" for p in SHAPES} | {"text_encoder.q_proj"}


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("kohya", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"),
        ("diffusers", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_a_text_encoder_under_the_names_that_files_use(tmp_path, format, name):
    model = clip()
    adapter = plait.attach(model, "lora", targets=["q_proj"], rank=2)
    file = adapter.save(tmp_path / "a.safetensors", format=format)
    assert name in load_file(file)
    assert set(plait.load(model, file, "again").deltas) == set(adapter.deltas)


def test_without_the_model_names_stay_kohyas(tmp_path):
    pairs = factors()
    save_file(kohya(pairs, SCALES), tmp_path / "a.safetensors")
    adapter = plait.read_adapter(tmp_path / "a.safetensors")
    delta = adapter.deltas["lora_unet_down_blocks_0_attn1_to_q"]
    down, up = pairs["down_blocks.0.attn1.to_q"]
    assert torch.allclose(delta.dense(), 2.0 * up @ down)
    adapter.save(tmp_path / "b.safetensors", format="kohya")
    wanted, got = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor)


DIFFUSERS = {
    "new": lambda path: (f"unet.{path}.lora_A.weight", f"unet.{path}.lora_B.weight"),
    "lora.down": lambda path: (f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight"),
    "without a part": lambda path: (f"{path}.lora_A.weight", f"{path}.lora_B.weight"),
}


@pytest.mark.parametrize("form", DIFFUSERS)
def test_diffusers_is_read(tmp_path, form):
    model, pairs = UNet(), factors()
    tensors = {}
    for path, (down, up) in pairs.items():
        tensors |= dict(zip(DIFFUSERS[form](path), (down, up), strict=True))
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    plait.load(model, tmp_path, "x")
    with torch.no_grad():
        close(model(X), by_hand(copy_of(model), pairs, {}))


def test_the_oldest_attention_names(tmp_path):
    model, pairs = UNet(), factors()
    tensors, old = {}, "unet.down_blocks.0.attn1.processor"
    for last, path in (("q", "down_blocks.0.attn1.to_q"), ("out", "down_blocks.0.attn1.to_out.0")):
        tensors[f"{old}.to_{last}_lora.down.weight"], tensors[f"{old}.to_{last}_lora.up.weight"] = (
            pairs[path]
        )
    save_file(tensors, tmp_path / "a.safetensors")
    plait.load(model, tmp_path / "a.safetensors")
    used = {p: v for p, v in pairs.items() if "attn1" in p}
    with torch.no_grad():
        close(model(X), by_hand(copy_of(model), used, {}))


def test_diffusers_metadata_gives_the_scale(tmp_path):
    model, pairs = UNet(), factors()
    tensors = {}
    for path, (down, up) in pairs.items():
        tensors |= dict(zip(DIFFUSERS["new"](path), (down, up), strict=True))
    recorded = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.rank_pattern": {"to_out.0": 3},
        "unet.alpha_pattern": {"conv_in": 1},
    }
    metadata = {"lora_adapter_metadata": json.dumps(recorded)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    plait.load(model, tmp_path / "a.safetensors")
    scales = dict.fromkeys(SHAPES, 3.0)
    scales |= {"down_blocks.0.attn1.to_out.0": 2.0, "conv_in": 0.5}
    with torch.no_grad():
        close(model(X), by_hand(copy_of(model), pairs, scales))


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_what_we_write_is_read_again(tmp_path, format):
    model = Pipeline()
    targets = ["to_q", "to_out.0", "conv_in", "q_proj"]
    adapter = plait.attach(model, "lora", targets=targets, rank=3, alpha=5)
    adapter.deltas["unet.conv_in"].hold_back()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
        expected = model(X)
        adapter.save(tmp_path / "a", format=format)
        plait.detach(model)
        plait.load(model, tmp_path / "a.safetensors")
        close(model(X), expected)


def test_written_names_are_the_formats_own(tmp_path):
    model = UNet()
    adapter = plait.attach(model, "lora", targets=["to_q"], rank=3, alpha=6)
    adapter.save(tmp_path / "k.safetensors", format="kohya")
    name = "lora_unet_down_blocks_0_attn1_to_q"
    written = load_file(tmp_path / "k.safetensors")
    assert set(written) == {f"{name}.{e}" for e in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert float(written[f"{name}.alpha"]) == 6.0
    adapter.save(tmp_path / "d.safetensors", format="diffusers")
    name = "unet.down_blocks.0.attn1.to_q"
    written = load_file(tmp_path / "d.safetensors")
    assert set(written) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "belongs to no LoRA"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1)}, "lora_A.weight"),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, r"adapter_config\.json"),
        (kohya({"conv_in": (torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1))}, {}), "shape"),
        (kohya({"nowhere": (torch.ones(2, 4), torch.ones(8, 2))}, {}), "none of its modules"),
        (
            kohya({"proj": factors()["proj"], "poj": factors()["proj"]}, {}),
            "'lora_unet_poj' is not in this model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tensors, cause):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=cause) as caught:
        plait.load(UNet(), tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_checkpoints_are_refused(tmp_path):
    torch.save(kohya(factors(), SCALES), tmp_path / "a.ckpt")
    with pytest.raises(FormatError, match="pickle file"):
        plait.load(UNet(), tmp_path / "a.ckpt")
    assert plait.load(UNet(), tmp_path / "a.ckpt", allow_pickle=True).deltas


def test_what_is_no_lora_is_not_written(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    adapter = plait.attach(model, "lora", targets=["0", "1"], rank=2)
    with pytest.raises(PlaitError, match="'0' \\(embedding\\)"):
        adapter.save(tmp_path / "a", format="kohya")


def test_a_grouped_convolution(tmp_path):
    """kohya's down convolution sees all channels, a grouped weight only its own: refused."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    tensors = kohya({"0": (torch.ones(2, 4, 3, 3), torch.ones(4, 2, 1, 1))}, {})
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="shape"):
        plait.load(model, tmp_path / "a.safetensors")
