"""PEFT's LoRA folders and ours, with PEFT itself as the oracle."""

import json

import pytest
import torch
from peft import LoraConfig
from peft_models import (
    check_both_ways,
    close,
    gpt2,
    llama,
    loaded_by_peft,
    logits,
    moe,
    peft_model,
    saved_by_peft,
)

import plait

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"layers.1.mlp.gate_proj": 2, "q_proj": 5, r"layers\.0\.mlp.*_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 1, "down_proj": 20},
}

LLAMA = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "dora": {"target_modules": ALL, "use_dora": True},
    "regular expression": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "patterns": {"target_modules": ALL, **PATTERNS},
    "patterns and rslora": {"target_modules": ALL, "use_rslora": True, **PATTERNS},
    "exclude": {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]},
    "layers": {"target_modules": ALL, "layers_to_transform": [1], "layers_pattern": "layers"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms and embedding kept whole": {
        "target_modules": ALL,
        "modules_to_save": ["embed_tokens", "norm", "layers.0.input_layernorm"],
    },
    "a block kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
    "pissa": {"target_modules": ALL, "init_lora_weights": "pissa"},
    "pissa and rslora": {"target_modules": ALL, "init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"target_modules": ALL, "init_lora_weights": "olora"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", LLAMA)
def test_llama(tmp_path, name):
    tolerance = 3e-5 if "pissa" in name or "olora" in name else 1e-5
    check_both_ways(llama(), LoraConfig(r=4, lora_alpha=6, **LLAMA[name]), tmp_path, tolerance)


GPT2 = {
    "plain": {"target_modules": ["c_attn", "c_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True},
    "embeddings": {"target_modules": ["wte", "wpe", "c_fc"]},
    "lora bias": {"target_modules": ["c_attn", "c_fc"], "lora_bias": True},
    "biases of targets": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "all biases": {"target_modules": ["c_attn"], "bias": "all"},
    "pissa": {"target_modules": ["c_attn"], "init_lora_weights": "pissa"},
    "head kept whole": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]},
}


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_with_its_transposed_linears(tmp_path, name):
    config = LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=True, **GPT2[name])
    check_both_ways(gpt2(), config, tmp_path, 3e-5 if name == "pissa" else 1e-5)


def test_biases_of_a_llama(tmp_path):
    for bias in ("lora_only", "all"):
        config = LoraConfig(r=4, target_modules=["q_proj"], bias=bias)
        adapter = check_both_ways(llama(bias=True), config, tmp_path / bias)
        assert len([p for p in adapter.deltas if p.endswith(".bias")]) == (
            2 if bias != "all" else 8
        )


def test_a_classifier_head(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    check_both_ways(llama(classify=True), config, tmp_path)


def test_tied_embedding_with_lora_on_it(tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    check_both_ways(llama(tie=True), config, tmp_path)


def test_packed_experts(tmp_path):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
    )
    adapter = check_both_ways(moe(), config, tmp_path)
    assert sum(d.site.kind == "parameter" for d in adapter.deltas.values()) == 2


def test_a_converted_pissa_is_a_plain_lora(tmp_path):
    base = llama()
    start = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    model = peft_model(base, start)
    import copy

    from peft import get_peft_model

    fresh = get_peft_model(copy.deepcopy(base), start)
    fresh.peft_config["default"].init_lora_weights = True
    fresh.save_pretrained(tmp_path / "start")
    expected = logits(model)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter = plait.load(base, tmp_path / "converted")
    close(logits(base), expected, 3e-5)
    assert {d.rank for d in adapter.deltas.values()} == {8}


def test_a_start_that_cannot_be_computed_again_says_why(tmp_path):
    base = llama()
    start = "pissa_niter_2"
    saved_by_peft_without_check(base, start, tmp_path / "a")
    with pytest.raises(plait.PlaitError, match="path_initial_model_for_weight_conversion"):
        plait.load(base, tmp_path / "a")
    saved_by_peft_without_check(base, "pissa", tmp_path / "b")
    with pytest.raises(plait.PlaitError, match="pass model="):
        plait.read_adapter(tmp_path / "b")


def saved_by_peft_without_check(base, start, path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    peft_model(base, config).save_pretrained(path)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    saved_by_peft(llama(), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), tmp_path / "a")
    return tmp_path / "a"


def test_an_adapter_without_the_model_answers(folder):
    adapter = plait.read_adapter(folder)
    base = llama()
    attached = plait.load(base, folder)
    assert adapter.name == "a" and set(adapter.deltas) == set(attached.deltas)
    for path, delta in adapter.deltas.items():
        assert torch.equal(delta.dense(), attached.deltas[path].dense())


def test_overlapping_ranks_are_read_although_peft_reorders_its_patterns(tmp_path):
    base = llama()
    patterns = {"q_proj": 5, r"layers\.0\..*_proj": 3}  # saved the other way round, and then
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], rank_pattern=patterns)
    model = peft_model(base, config)  # PEFT cannot load its own folder
    model.save_pretrained(tmp_path)
    adapter = plait.load(base, tmp_path)
    close(logits(base), logits(model))
    assert [d.rank for d in adapter.deltas.values()] == [5, 3, 5, 4]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_something_new": True}, "use_something_new=True is a switch"),
        ({"r": 5}, "ask for [5, 32]"),
        ({"r": 10**13}, ""),
        ({"r": "x"}, ""),
        ({"peft_type": "PREFIX_TUNING"}, "not one that Plait reads"),
        ({"peft_type": None}, "names no peft_type"),
        ({"peft_type": "lora"}, "not one that Plait reads"),
        ({"r": 5, "rank_pattern": {"q_proj": 3}}, "shape"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
    ],
)
def test_what_would_compute_something_else_is_refused(folder, changes, cause):
    edit(folder, **changes)
    with pytest.raises(plait.PlaitError) as caught:
        plait.load(llama(), folder)
    assert cause in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keys_that_say_nothing_pass_and_others_warn(folder):
    import warnings

    edit(folder, use_something_new=False, some_config=None, a_list=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plait.load(llama(), folder)
    edit(folder, novelty=3)
    with pytest.warns(UserWarning, match="novelty"):
        plait.load(llama(), folder)


def test_a_pickle_is_refused_unless_asked_for(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(plait.PlaitError, match=r"pickle.*allow_pickle=True"):
        plait.load(llama(), folder)
    base = llama()
    plait.load(base, folder, allow_pickle=True)
    close(logits(base), loaded_by_peft(base_without_adapter(), folder))


def base_without_adapter():
    return llama()


def test_a_pickle_that_runs_code_is_refused_even_then(folder):
    class Trap:
        def __reduce__(self):
            return print, ("ran",)

    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, folder / "adapter_model.bin")
    with pytest.raises(plait.PlaitError, match="cannot be read as tensors"):
        plait.load(llama(), folder, allow_pickle=True)


def test_the_wrong_base_model_is_named(folder):
    with pytest.raises(plait.PlaitError, match="right base model"):
        plait.load(gpt2(), folder)


# -- writing --------------------------------------------------------------------------------------


def randomise(adapter):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return adapter


CORE = {
    *("peft_type", "base_model_name_or_path", "task_type", "r", "lora_alpha", "target_modules"),
    *("bias", "use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "inference_mode"),
}


def test_only_keys_that_every_peft_knows_are_written(tmp_path):
    adapter = randomise(plait.attach(llama(), "lora", rank=4))
    adapter.save(tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config) == CORE
    assert sorted(config["target_modules"]) == sorted(ALL)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["layers.1.self_attn.q_proj", "up_proj"], r".*layers\.0\.(?!mlp).*_proj"],
)
def test_targets_are_minimal_and_exact(tmp_path, targets):
    base = llama()
    adapter = randomise(plait.attach(base, "lora", targets=targets, rank=2))
    expected = logits(base)
    adapter.save(tmp_path / "a", format="peft")
    plait.detach(base)
    close(loaded_by_peft(base, tmp_path / "a"), expected)
    with torch.no_grad():
        written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(written, list) and len(written) <= len(adapter.deltas)


def test_ranks_per_site_and_held_back_starts(tmp_path):
    base = llama()
    overrides = {"q_proj": {"rank": 2, "alpha": 7.0}, "layers.1.mlp.up_proj": {"rank": 5}}
    adapter = randomise(plait.attach(base, "lora", rank=3, overrides=overrides))
    for delta in list(adapter.deltas.values())[::2]:
        delta.hold_back()
    randomise(adapter)
    expected = logits(base)
    adapter.save(tmp_path / "a", format="peft")
    plait.detach(base)
    close(loaded_by_peft(base, tmp_path / "a"), expected)
    plait.load(base, tmp_path / "a")
    close(logits(base), expected)


def test_an_adapter_that_is_not_attached_is_written_by_its_paths(tmp_path):
    base = llama()
    adapter = randomise(plait.attach(base, "lora", targets=["v_proj"], rank=2))
    expected = logits(base)
    plait.detach(base)
    adapter.save(tmp_path / "a", format="peft")
    close(loaded_by_peft(base, tmp_path / "a"), expected)


def test_a_module_of_its_own_is_written_for_peft(tmp_path):
    base = llama()
    adapter = randomise(
        plait.attach(base, "lora", targets=["v_proj"], train_modules=["lm_head"], rank=2)
    )
    expected = logits(base)
    adapter.save(tmp_path / "a", format="peft")
    plait.detach(base)
    close(loaded_by_peft(base, tmp_path / "a"), expected)


def test_one_folder_holds_one_format(tmp_path):
    adapter = plait.attach(llama(), "lora", targets=["v_proj"], rank=2)
    adapter.save(tmp_path / "a")
    with pytest.raises(plait.PlaitError, match="choose another folder"):
        adapter.save(tmp_path / "a", format="peft")
    adapter.save(tmp_path / "b", format="peft")
    with pytest.raises(plait.PlaitError, match="choose another folder"):
        adapter.save(tmp_path / "b")
