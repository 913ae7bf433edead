"""extract, compress: from folders to an adapter's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plait
from tiny_language_model import tiny_model


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, draw = tiny_model(), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        left = torch.randn(parameter.shape[0], 2, generator=draw) * 0.05
        right = torch.randn(2, parameter[0].numel(), generator=draw)
        parameter.data += (left @ right).reshape(parameter.shape)
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    model.save_pretrained(folder)
    return folder


def test_extract_writes_an_adapter_that_makes_the_base_the_fine_tune(
    run, base: Path, tuned: Path, tmp_path: Path
) -> None:
    code, out, err = run("extract", base, tuned, "--rank", 2, "-o", tmp_path / "ex")
    assert code == 0, err
    assert "holds 100.00%" in out and "16 sites" in out and "norms and biases kept" in out
    adapter = plait.read_adapter(tmp_path / "ex")
    assert adapter.name == "ex" and len(adapter.info["base_fingerprint"]) == 32
    model, tokens = tiny_model(), torch.arange(20)[None]
    expected = type(model).from_pretrained(tuned)(tokens).logits
    plait.load(model, tmp_path / "ex")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)


def test_extract_for_peft_in_half_precision(run, base: Path, tuned: Path, tmp_path: Path) -> None:
    words = ("--to", "peft", "--dtype", "float16", "--target", "q_proj", "--target", "mlp.up_proj")
    code, out, err = run("extract", base, tuned, *words, "-o", tmp_path / "peft")
    assert code == 0, err
    assert "4 sites" in out and "left out" in out
    adapter = plait.read_adapter(tmp_path / "peft")
    assert {p.dtype for p in adapter.parameters()} == {torch.float16}


def test_extract_names_what_is_wrong(run, base: Path, tuned: Path, tmp_path: Path) -> None:
    code, _, err = run("extract", base, base, "-o", tmp_path / "none")
    assert code == 2 and "changes nothing" in err
    code, _, err = run("extract", base, tuned, "--svd", "exct", "-o", tmp_path / "none")
    assert code == 2 and "exact" in err


def test_compress_cuts_ranks_and_says_what_it_drops(run, adapters, tmp_path: Path) -> None:
    code, out, err = run("compress", adapters["sql"], "--energy", 0.9, "-o", tmp_path / "small")
    assert code == 0, err
    assert "dropped energy: mean" in out and "was " in out
    small, sql = plait.read_adapter(tmp_path / "small"), plait.read_adapter(adapters["sql"])
    assert small.num_parameters() < sql.num_parameters()
    for path, share in small.info["dropped_energy"].items():
        change = sql.deltas[path].dense().detach()
        gap = (small.deltas[path].dense().detach() - change).norm() / change.norm()
        assert float(gap) ** 2 == pytest.approx(share, abs=1e-4) and share <= 0.1
    code, _, err = run("compress", adapters["sql"], "-o", tmp_path / "none")
    assert code == 2 and "rank=, energy= and budget=" in err


def test_compress_to_a_few_bits(run, adapters, tmp_path: Path) -> None:
    code, out, err = run("compress", adapters["sql"], "--bits", 4, "-o", tmp_path / "bits")
    assert code == 0, err
    assert "4 bits a number, relative error of dW: mean 0.1" in out and "dropped" not in out
    sizes = [
        (p / "adapter.safetensors").stat().st_size for p in (adapters["sql"], tmp_path / "bits")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    code, out, _ = run("compress", adapters["sql"], "--rank", 2, "--bits", 8, "-o", tmp_path / "r2")
    assert code == 0 and "rank 2" in out and "8 bits" in out
    assert {d.rank for d in plait.read_adapter(tmp_path / "r2").deltas.values()} == {2}
    words = ("--bits", 1, "--to", "peft", "-o", tmp_path / "none")
    code, _, err = run("compress", adapters["sql"], *words)
    assert code == 2 and "only Plait's format" in err


def test_a_bank_of_adapters_and_one_taken_out_again(run, adapters, tmp_path: Path) -> None:
    paths = (adapters["sql"], adapters["chat"])
    where = ("--joint", "--rank", 6, "--dtype", "float32", "-o", tmp_path / "bank")
    code, out, err = run("compress", *paths, *where)
    assert code == 0, err
    assert "sql: error of dW: mean" in out and "2 adapters" in out
    code, out, err = run("convert", tmp_path / "bank", tmp_path / "sql", "--adapter", "sql")
    assert code == 0, err
    again, sql = plait.read_adapter(tmp_path / "sql"), plait.read_adapter(adapters["sql"])
    for path, delta in sql.deltas.items():
        torch.testing.assert_close(again.deltas[path].dense(), delta.dense(), rtol=0, atol=1e-4)
    code, _, err = run("convert", tmp_path / "bank", tmp_path / "none", "--adapter", "sqk")
    assert code == 2 and "did you mean 'sql'" in err
    code, _, err = run("compress", *paths, "--rank", 2, "-o", tmp_path / "none")
    assert code == 2 and "--joint" in err
    small = ("--joint", "--energy", 0.5, "--bits", 4, "-o", tmp_path / "small")
    assert run("compress", *paths, *small)[0] == 0
    sizes = [(tmp_path / n / "bank.safetensors").stat().st_size for n in ("bank", "small")]
    assert sizes[1] < 0.5 * sizes[0]
