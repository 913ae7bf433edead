"""Convolutions and embeddings of any torch module in PEFT's folders, both ways."""

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from peft_models import close, peft_model
from torch import nn

import plait


class Pictures(nn.Module):
    """Embedded tokens as an image: a table, two kinds of convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 3)
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.along = nn.Conv1d(6, 5, 3, stride=2)
        self.out = nn.Linear(5, 4)

    def forward(self, ids):
        x = self.table(ids).permute(0, 3, 1, 2)
        x = torch.tanh(self.point(torch.tanh(self.wide(x)))).flatten(2)
        return self.out(torch.tanh(self.along(x)).mT)


IDS = torch.arange(50).reshape(2, 5, 5) % 16
CASES = {
    "lora": LoraConfig(r=2, lora_alpha=5, target_modules=["wide", "point", "along", "table"]),
    "dora": LoraConfig(r=2, lora_alpha=5, target_modules=["wide", "point", "along"], use_dora=True),
    "dora on a table": LoraConfig(r=2, target_modules=["table", "out"], use_dora=True),
    "lora bias": LoraConfig(r=2, target_modules=["wide", "out"], lora_bias=True),
    "ia3": IA3Config(target_modules=["wide", "point"], feedforward_modules=["point"]),
}


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


def in_peft(base: nn.Module, folder) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(PeftModel.from_pretrained(copy.deepcopy(base), folder))


@pytest.mark.parametrize("name", CASES)
def test_both_ways(tmp_path, name):
    base = Pictures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(base, CASES[name])
        model.save_pretrained(tmp_path / "theirs")
    expected, plain = run(model), run(base)
    assert (expected - plain).abs().max() > 1e-2
    adapter = plait.load(base, tmp_path / "theirs")
    close(run(base), expected)
    adapter.save(tmp_path / "ours", format="peft")
    plait.detach(base)
    close(in_peft(base, tmp_path / "ours"), expected)
