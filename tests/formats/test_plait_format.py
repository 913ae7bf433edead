"""Plait's own folder: everything comes back bit for bit, and nothing hostile gets in."""

import errno
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import plait
from plait.adapter.formats import atomic
from plait.errors import FormatError, PlaitError


class Net(nn.Module):
    """A layer of every kind that a weight can have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(2, 5, 6))
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).relu().mT
        return self.head(self.fc(x)) + self.experts.gate_up_proj.sum()


def randomise(adapter) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def trained(model: nn.Module, **options):
    targets = ["embed", "conv", "fc", "experts.gate_up_proj"]
    adapter = plait.attach(model, "lora", targets=targets, seed=7, **options)
    randomise(adapter)
    return adapter


def same(one, two) -> bool:
    a, b = one.state_dict(), two.state_dict()
    exact = all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    return list(a) == list(b) and exact


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return trained(Net(), rank=3).save(tmp_path / "one")


def edit(folder: Path, **changes) -> None:
    file = folder / "plait.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_kind_of_site_with_its_own_rank_comes_back_bit_for_bit(tmp_path):
    model = Net()
    overrides = {"fc": {"rank": 1, "alpha": 5.0}, "conv": {"rank": 4, "rslora": True}}
    adapter = trained(model, rank=3, overrides=overrides)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        expected = model(ids)
        adapter.save(tmp_path / "a")
        plait.detach(model)
        assert not torch.equal(model(ids), expected)
        loaded = plait.load(model, tmp_path / "a", "again")
        assert torch.equal(model(ids), expected)
    assert same(adapter, loaded) and loaded.seed == 7 and loaded.name == "again"
    options = {p: d.options for p, d in adapter.deltas.items()}
    assert {p: d.options for p, d in loaded.deltas.items()} == options
    sites = [(s.path, s.kind, s.shape, s.details) for s in (d.site for d in loaded.deltas.values())]
    before = [
        (s.path, s.kind, s.shape, s.details) for s in (d.site for d in adapter.deltas.values())
    ]
    assert sites == before


def test_a_held_back_start_comes_back(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = plait.attach(model, "lora", rank=2)
    delta = adapter.deltas["0"]
    delta.set_pair(torch.randn(2, 6), torch.randn(5, 2))
    delta.hold_back()
    randomise(adapter)
    loaded = plait.read_adapter(adapter.save(tmp_path / "a"))
    assert same(adapter, loaded)
    assert torch.equal(loaded.deltas["0"].dense(), delta.dense())


def test_ranks_that_changed_in_training_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    adapter = plait.attach(model, "lora", rank=3)
    randomise(adapter)
    adapter.deltas["0"].keep([0, 2])
    adapter.deltas["1"].grow(2)
    loaded = plait.read_adapter(adapter.save(tmp_path / "a"))
    assert same(adapter, loaded)
    for path, delta in adapter.deltas.items():
        assert torch.equal(loaded.deltas[path].dense(), delta.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(tmp_path, dtype):
    adapter = plait.attach(nn.Sequential(nn.Linear(6, 5)), "lora", rank=2, dtype=dtype)
    randomise(adapter)
    assert same(adapter, plait.read_adapter(adapter.save(tmp_path / "a")))


def test_info_is_kept(tmp_path):
    adapter = trained(Net(), rank=2)
    adapter.info |= {"base": "some/model", "steps": 3, "loss": 0.5}
    assert plait.read_adapter(adapter.save(tmp_path / "a")).info == adapter.info


def test_replaced_modules_come_back_and_act(tmp_path):
    model, ids = Net(), torch.arange(11)[None]
    base = model(ids)
    adapter = plait.attach(model, "lora", targets=["fc", "head.0"], train_modules=["head"], rank=2)
    assert list(adapter.deltas) == ["fc", "head"]  # what lies in a replaced module is left out
    assert torch.equal(model(ids), base)
    randomise(adapter)
    expected = model(ids)
    adapter.save(tmp_path / "a")
    plait.activate(model, {})
    assert torch.equal(model(ids), base)
    plait.detach(model)
    plait.load(model, tmp_path / "a")
    assert torch.equal(model(ids), expected)


def test_replaced_modules_train_and_leave_the_base_alone():
    model, ids = Net(), torch.arange(11)[None]
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter = plait.attach(model, "lora", targets=["fc"], train_modules=["head"], rank=2)
    names = [n for n, _ in adapter.named_parameters()]
    whole = [f"head.module:{i}:{name}" for i in (0, 1) for name in ("weight", "bias")]
    assert names == ["fc.A", "fc.B", *whole]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(ids).square().sum().backward()
    assert all(p.grad is not None for n, p in adapter.named_parameters() if n.startswith("head"))
    optimizer.step()
    plait.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_unknown_module_to_train_names_the_nearest():
    with pytest.raises(PlaitError, match="did you mean 'head'"):
        plait.attach(Net(), "lora", targets=["fc"], train_modules=["haed"])


def test_saving_over_an_adapter_replaces_it_and_keeps_other_files(tmp_path, saved):
    (saved / "notes.txt").write_text("mine")
    second = trained(Net(), rank=2)
    second.save(saved)
    assert same(second, plait.read_adapter(saved))
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter.safetensors",
        "notes.txt",
        "plait.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    "stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("broken", ["adapter.safetensors", "plait.json"])
def test_a_full_disk_or_ctrl_c_leaves_the_old_adapter_intact(
    tmp_path, saved, monkeypatch, stop, broken
):
    old = plait.read_adapter(saved)
    real = atomic._write

    def failing(file: Path, write) -> None:
        if file.name != broken:
            return real(file, write)
        real(file, write)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        raise stop

    monkeypatch.setattr(atomic, "_write", failing)
    with pytest.raises((FormatError, KeyboardInterrupt)) as caught:
        trained(Net(), rank=2).save(saved)
    if isinstance(stop, OSError):
        assert "No space left" in str(caught.value) and str(saved) in str(caught.value)
    with pytest.raises((FormatError, KeyboardInterrupt)):
        trained(Net(), rank=2).save(tmp_path / "new")
    assert same(old, plait.read_adapter(saved))
    assert [p.name for p in tmp_path.iterdir()] == ["one"] and len(list(saved.iterdir())) == 2


def test_files_are_as_readable_as_the_umask_says(saved):
    assert (saved / "adapter.safetensors").stat().st_mode == (saved / "plait.json").stat().st_mode


def one_line(caught, *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message and all(p in message for p in parts), message


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(saved, keep):
    file = saved / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError) as caught:
        plait.read_adapter(saved)
    one_line(caught, "adapter.safetensors", "damaged")


def test_a_huge_header_is_refused(saved):
    file = saved / "adapter.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    with pytest.raises(FormatError, match=r"adapter\.safetensors: damaged"):
        plait.read_adapter(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": ' * 100_000, "\ufeffnull", "NaN"])
def test_garbage_for_json_is_named(saved, text):
    (saved / "plait.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        plait.read_adapter(saved)
    one_line(caught, "plait.json")


def test_missing_files_are_named(saved, tmp_path):
    (saved / "adapter.safetensors").unlink()
    with pytest.raises(FormatError, match=r"adapter\.safetensors: no such file"):
        plait.read_adapter(saved)
    with pytest.raises(FormatError, match="no such file"):
        plait.read_adapter(tmp_path / "nowhere" / "x" / "y")
    with pytest.raises(FormatError, match="does not download"):
        plait.read_adapter("someone/some-adapter")
    with pytest.raises(FormatError, match="did you mean its folder 'one'"):
        (saved / "adapter.safetensors").write_bytes(b"")
        plait.read_adapter(tmp_path)


def site(**changes) -> list[dict]:
    return [{"path": "fc", "layout": "linear", "shape": [6, 8]} | changes]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"options": {"rank": 10**12}}, "out of all proportion"),
        ({"options": {"rank": 2**62}}, "out of all proportion"),
        ({"options": {"rank": -3}}, "rank"),
        ({"options": {"rank": "8"}}, ""),
        ({"options": {"rank": [8]}}, ""),
        ({"options": {"rnk": 8}}, "did you mean 'rank'"),
        ({"options": None}, "options"),
        ({"sites": site(shape=[10**9, 10**9])}, "out of all proportion"),
        ({"sites": site(shape=[2**50, 8])}, "which no weight has"),
        ({"sites": site(shape=[-6, 8])}, "which no weight has"),
        ({"sites": site(shape="big")}, "shape"),
        ({"sites": site(shape=[6])}, ""),
        ({"sites": site(layout="os.system")}, "layout"),
        ({"sites": site(path="../../etc/passwd")}, "not the name"),
        ({"sites": site(delta="os")}, "no delta 'os'"),
        ({"sites": site(delta="LowRank")}, "no delta 'LowRank'"),
        ({"sites": site() + site()}, "twice"),
        ({"sites": [1]}, "sites"),
        ({"sites": site()}, "is unknown"),
        ({"method": "lroa"}, "did you mean 'lora'"),
        ({"method": ["lora"]}, "method"),
        ({"method": "../lora"}, "unknown method"),
        ({"name": "../up"}, "may hold only"),
        ({"seed": "x"}, "seed"),
        ({"dtype": "load"}, "dtype"),
        ({"version": 99}, "upgrade"),
        ({"format": "zip"}, "not a Plait adapter"),
        ({"checksums": []}, "checksums"),
    ],
)
def test_a_hostile_description_is_refused_in_one_line(saved, changes, cause):
    edit(saved, **changes)
    with pytest.raises(FormatError) as caught:
        plait.read_adapter(saved)
    one_line(caught, "plait.json", cause)


def test_a_tensor_of_another_shape_is_named(saved):
    edit(saved, options={"rank": 2, "alpha": None})
    with pytest.raises(FormatError, match=r"'embed\.A' has shape \[3, 11\] in the file"):
        plait.read_adapter(saved)


def test_nan_is_a_warning_that_names_the_tensor(tmp_path):
    adapter = trained(Net(), rank=2)
    with torch.no_grad():
        adapter.deltas["fc"].B[1, 0] = float("nan")
    adapter.save(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"'fc\.B' holds NaN"):
        plait.read_adapter(tmp_path / "a")


def test_an_adapter_for_another_model_says_so(saved):
    model = Net()
    model.fc = nn.Linear(8, 7)
    with pytest.raises(PlaitError, match=r"'fc' is \[7, 8\] in this model"):
        plait.load(model, saved)
    assert plait.adapters(model) == {}


def test_a_name_can_be_loaded_once(saved):
    model = Net()
    plait.load(model, saved, "x")
    with pytest.raises(PlaitError, match="already attached"):
        plait.load(model, saved, "x")


def test_loading_freezes_unless_asked(saved):
    frozen = plait.load(Net(), saved)
    assert not any(p.requires_grad for p in frozen.parameters())
    training = plait.load(Net(), saved, trainable=True)
    assert all(p.requires_grad for p in training.parameters())


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(PlaitError, match="did you mean 'plait'"):
        trained(Net(), rank=1).save(tmp_path / "a", format="plat")
