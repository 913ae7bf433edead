"""LoHa, LoKr and GraLoRA both ways, with PEFT itself as the oracle."""

import warnings

import pytest
import torch
from peft import GraloraConfig, LoHaConfig, LoKrConfig
from peft_models import check_both_ways, close, gpt2, llama, loaded_by_peft, logits, peft_model
from torch import nn

import plait
from plait.errors import FormatError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "loha": LoHaConfig(r=4, alpha=2, target_modules=ALL),
    "loha by low rank": LoHaConfig(r=2, alpha=4, target_modules=ALL),
    "loha with patterns": LoHaConfig(
        r=2, target_modules=ALL, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5}
    ),
    "loha with dropouts": LoHaConfig(
        r=2, target_modules=["q_proj"], rank_dropout=0.1, module_dropout=0.1
    ),
    "lokr": LoKrConfig(r=4, alpha=2, target_modules=ALL),
    "lokr, full": LoKrConfig(r=100, alpha=100, target_modules=ALL),
    "lokr, both low-rank": LoKrConfig(r=1, target_modules=ALL, decompose_both=True),
    "lokr by factor": LoKrConfig(r=2, target_modules=ALL, decompose_factor=5),
    "lokr with patterns": LoKrConfig(
        r=2, target_modules=ALL, rank_pattern={"q_proj": 1}, alpha_pattern={"up_proj": 5}
    ),
    "gralora": GraloraConfig(r=4, gralora_k=2, target_modules=ALL),
    "gralora, finer": GraloraConfig(r=8, gralora_k=4, alpha=3, target_modules=["q_proj"]),
    "gralora, hybrid": GraloraConfig(
        r=4, gralora_k=2, hybrid_r=3, gralora_dropout=0.1, target_modules=["v_proj", "up_proj"]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown keys.*")
        check_both_ways(llama(), CASES[name], tmp_path)


def test_gralora_on_gpt2_with_its_transposed_linears(tmp_path):
    config = GraloraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    check_both_ways(gpt2(), config, tmp_path)


def test_of_two_patterns_the_one_that_made_the_tensors_counts(tmp_path):
    patterns = {".*q_proj": 1, ".*0.self_attn.q_proj": 3}  # PEFT saves them in another order
    model = peft_model(llama(), LoHaConfig(r=2, target_modules=ALL, rank_pattern=patterns))
    model.save_pretrained(tmp_path)
    base = llama()
    plait.load(base, tmp_path)
    close(logits(base), logits(model))


class Pictures(nn.Module):
    """Two convolutions behind the call that `logits` makes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 1)

    def forward(self, ids):
        x = torch.sin(torch.arange(2 * 4 * 25).view(2, 4, 5, 5).float())
        y = self.second(torch.tanh(self.first(x)))
        return type("Output", (), {"logits": y})


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["first", "second"]),
        LoKrConfig(r=1, target_modules=["first", "second"]),
        LoKrConfig(r=100, target_modules=["first", "second"]),
    ],
    ids=["loha", "lokr", "lokr full"],
)
def test_convolutions(tmp_path, config):
    check_both_ways(Pictures().eval(), config, tmp_path)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_tucker_convolutions_are_refused(tmp_path, config):
    from peft import get_peft_model

    given = config(r=1, target_modules=["first"], use_effective_conv2d=True)
    get_peft_model(Pictures(), given).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"_t[12]"):
        plait.load(Pictures(), tmp_path)
    plain = config(r=1, target_modules=["second"], use_effective_conv2d=True)  # 1 x 1: no Tucker
    check_both_ways(Pictures().eval(), plain, tmp_path / "plain")


def test_sites_are_read_without_the_model_where_the_tensors_tell(tmp_path):
    for name, config in (("gralora", CASES["gralora"]), ("lokr", CASES["lokr, full"])):
        check_both_ways(llama(), config, tmp_path / name)
        bare = plait.read_adapter(tmp_path / name / "theirs")
        whole = plait.read_adapter(tmp_path / name / "theirs", model=llama())
        assert set(bare.deltas) == set(whole.deltas)
        for path, delta in whole.deltas.items():
            assert bare.deltas[path].site.shape == delta.site.shape
            assert torch.equal(bare.deltas[path].dense(), delta.dense())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loha", {"rank": 2, "alpha": 5.0}),
        ("lokr", {"rank": 2, "overrides": {"q_proj": {"rank": 1, "alpha": 3.0}}}),
        ("gralora", {"rank": 4, "k": 4, "hybrid_rank": 2}),
    ],
)
def test_ours_in_peft(tmp_path, method, options):
    base = llama()
    adapter = plait.attach(base, method, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = logits(base)
    adapter.save(tmp_path / "a", format="peft")
    plait.detach(base)
    assert (logits(base) - expected).abs().max() > 1e-2
    close(loaded_by_peft(base, tmp_path / "a"), expected, 2e-5)


def test_what_peft_lacks_is_refused(tmp_path):
    adapter = plait.attach(gpt2(), "loha", targets=["c_attn"], rank=2)
    with pytest.raises(FormatError, match="Conv1D"):
        adapter.save(tmp_path / "a", format="peft")
