"""OFT, BOFT, HRA and RoAd in PEFT's folders, both ways, with PEFT itself as the oracle."""

import json
import warnings
from unittest import mock

import pytest
import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, RoadConfig
from peft_models import (
    check_both_ways,
    check_in_peft,
    close,
    gpt2,
    llama,
    loaded_by_peft,
    saved_by_peft,
)
from torch import nn

import plait

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "oft": OFTConfig(oft_block_size=8, target_modules=ALL),
    "oft with other terms": OFTConfig(
        oft_block_size=8, target_modules=["q_proj"], num_cayley_neumann_terms=3
    ),
    "oft exact": OFTConfig(oft_block_size=16, target_modules=ALL, use_cayley_neumann=False),
    "oft by number of blocks": OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "oft shared": OFTConfig(oft_block_size=8, target_modules=ALL, block_share=True),
    # 32 divides no 48: PEFT takes 24 there.
    "oft adjusted": OFTConfig(oft_block_size=32, target_modules=["q_proj", "down_proj"]),
    "oft constrained": OFTConfig(
        oft_block_size=8, target_modules=ALL, coft=True, eps=2.0, use_cayley_neumann=False
    ),
    "boft": BOFTConfig(boft_block_size=4, target_modules=ALL),
    "boft by number of blocks": BOFTConfig(
        boft_block_size=0, boft_block_num=4, target_modules=["q_proj", "k_proj"]
    ),
    "hra": HRAConfig(r=6, target_modules=ALL),
    "hra odd": HRAConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "hra orthogonal": HRAConfig(r=5, target_modules=ALL, apply_GS=True, init_weights=False),
    "road 1": RoadConfig(variant="road_1", group_size=8, target_modules=ALL),
    "road 2": RoadConfig(variant="road_2", group_size=16, target_modules=ALL),
    "road 4": RoadConfig(variant="road_4", group_size=4, target_modules=["q_proj", "up_proj"]),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name):
    check_both_ways(llama(bias=True), CASES[name], tmp_path)


class BlockDiagonal:
    """PEFT's CUDA extension, in PyTorch."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies(tmp_path, factors):
    """PEFT multiplies several factors only where it can compile its extension."""
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=ALL)
    extension = mock.patch.multiple(
        "peft.tuners.boft.layer", get_fbd_cuda=lambda: True, FastBlockDiag=BlockDiagonal
    )
    with extension:
        adapter = check_both_ways(llama(bias=True), config, tmp_path)
    assert next(iter(adapter.deltas.values())).q.shape[0] == factors


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    "config",
    [
        BOFTConfig(boft_block_size=6, target_modules=["first", "second"]),
        HRAConfig(r=4, target_modules=["first", "second"]),
    ],
    ids=["boft", "hra"],
)
def test_convolutions(tmp_path, config):
    torch.manual_seed(0)
    model, x = Convolutions().eval(), torch.randn(2, 4, 6, 6)
    with mock.patch("peft_models.logits", lambda m: m(x).detach()):
        expected = saved_by_peft(model, config, tmp_path / "theirs")
        plait.load(model, tmp_path / "theirs").save(tmp_path / "ours", format="peft")
        close(model(x).detach(), expected)
        plait.detach(model)
        close(loaded_by_peft(model, tmp_path / "ours"), expected)


OURS = [
    ("oft", {"block_size": 8, "terms": None}),
    ("oft", {"block_size": 16, "radius": 0.5}),
    ("boft", {"block_size": 8}),
    ("hra", {"rank": 4}),
    ("hra", {"rank": 4, "orthogonal": True}),
    ("road", {"group_size": 8, "variant": 2}),
]


@pytest.mark.parametrize(("method", "options"), OURS)
def test_ours_in_peft(tmp_path, method, options):
    check_in_peft(tmp_path / "a", method, options, moved=1e-3, seed=0)


@pytest.mark.parametrize("name", ["oft", "boft", "hra", "road 1"])
def test_no_key_of_theirs_is_a_surprise(tmp_path, name):
    saved_by_peft(llama(), CASES[name], tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plait.load(llama(), tmp_path / "a")


def test_a_series_of_old_is_doubted(tmp_path):
    saved_by_peft(llama(), CASES["oft"], tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["peft_version"]
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"before 0\.18"):
        plait.load(llama(), tmp_path / "a")
    config |= {"peft_version": "0.19", "num_cayley_neumann_terms": 2}
    file.write_text(json.dumps(config))
    with pytest.raises(plait.PlaitError, match="2 terms"):
        plait.load(llama(), tmp_path / "a")


def test_what_peft_lacks_is_refused(tmp_path):
    model = Convolutions()
    adapter = plait.attach(model, "oft", targets="all-conv", block_size=6)
    with pytest.raises(plait.PlaitError, match="patches"):
        adapter.save(tmp_path / "a", format="peft")
    for method in ("oft", "boft", "hra", "road"):
        options = {"group_size": 8} if method == "road" else {}
        adapter = plait.attach(gpt2(), method, targets=["c_attn"], **options)
        with pytest.raises(plait.PlaitError, match="Conv1D"):
            adapter.save(tmp_path / "b", format="peft")
    sizes = {"q_proj": {"block_size": 16}}
    for method in ("oft", "boft"):
        mixed = plait.attach(llama(), method, block_size=8, overrides=sizes)
        with pytest.raises(plait.PlaitError, match="one block size"):
            mixed.save(tmp_path / "c", format="peft")
