"""Distributions of teachers: carried, fused, cached, and learned from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import TEXT, byte_level, metaspace
from torch import Tensor, nn

import plait
from plait.errors import FormatError, PlaitError
from plait.rules._cached_rows import CachedRows, examples_in, key_of_example, write_rows
from plait.rules._passes import IGNORE
from plait.rules.distil import Distil, sparse_excess
from plait.training.data import Collator, Encoded, encode_all, pack, read_examples
from plait.transfer import (
    Distributions,
    Teacher,
    VocabularyMap,
    fuse,
    fuse_distributions,
    teacher_rows,
)
from plait.transfer.distributions import carried, labels_of, predicted

SMOLLM2 = Path.home() / ".cache/plait/bases/smollm2-135m"
DATA = [{"text": text} for text in TEXT] + [
    {"prompt": "What is two and two? ", "completion": "two and two are four."}
]


def model(vocabulary: int, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        use_cache=False,
    )
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return made


def rows(ids: list[list[int]], shares: list[list[float]], mass: list[float]) -> Distributions:
    return Distributions(torch.tensor(ids), torch.tensor(shares), torch.tensor(mass))


def encoded(tokenizer) -> list[Encoded]:
    return encode_all(read_examples(DATA), tokenizer, 64, template=False).items


# -- a teacher's rows -----------------------------------------------------------------------------


def test_a_teacher_s_rows_are_its_leading_probabilities_at_each_label() -> None:
    tokenizer = byte_level()
    teacher = model(len(tokenizer))
    items = encoded(tokenizer)
    found = teacher_rows(teacher, items, top_k=5, temperature=1.5, batch_size=4)
    for item, got in zip(items, found, strict=True):
        with torch.no_grad():
            p = (teacher(input_ids=torch.tensor([item.input_ids])).logits[0] / 1.5).softmax(-1)
        for n, at in enumerate(predicted(item)):
            order = p[at - 1].argsort(descending=True)[:5]
            assert got.ids[n].tolist() == order.tolist()
            kept = p[at - 1][order]
            torch.testing.assert_close(got.mass[n], kept.sum())
            torch.testing.assert_close(got.shares[n], kept / kept.sum())


def test_the_adapters_that_are_active_on_a_teacher_take_part() -> None:
    tokenizer = byte_level()
    teacher, items = model(len(tokenizer)), encoded(tokenizer)
    (before,) = teacher_rows(teacher, items[:1])
    adapter = plait.attach(teacher, "lora", rank=2)
    for p in adapter.parameters():
        nn.init.normal_(p)
    (after,) = teacher_rows(teacher, items[:1])
    assert not torch.equal(before.ids, after.ids)
    plait.activate(teacher, {})
    (off,) = teacher_rows(teacher, items[:1])
    torch.testing.assert_close(off.shares, before.shares)


# -- to the target's tokens -----------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_rows_add_up_to_one_or_to_nothing_after_they_are_carried(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(6, 8, generator=g).softmax(-1)
    shares, ids = p.topk(4)
    given = Distributions(ids, shares / shares.sum(-1, keepdim=True), shares.sum(-1))
    pairs = {(i, (i + j) % 8): j + 1 for i in range(6) for j in range(2)}
    words = [bytes([97 + i]) for i in range(8)]
    mapping = VocabularyMap(words, [w + b"!" for w in words], "counts", pairs=pairs, farthest=0)
    found = carried(given, [0, None, 1, 2, 3, 4, 5], mapping, 5)
    total = found.shares.sum(-1)
    assert torch.all(((total - 1).abs() < 1e-5) | (total == 0))
    assert total[1] == 0 and not found.known[1]
    assert torch.all(found.mass <= given.mass.max() + 1e-6)
    dense = torch.zeros(6, 8)
    for i, row in enumerate(ids.tolist()):
        for index in row:
            for target, part in zip(*mapping.row(index), strict=True):
                dense[i, target] += p[i, index] * part
    for at, source in enumerate([0, None, 1, 2, 3, 4, 5]):
        if source is not None and bool(found.known[at]):
            leading = dense[source].topk(5).values
            torch.testing.assert_close(found.mass[at], leading.sum())
            torch.testing.assert_close(found.shares[at] * found.mass[at], leading)


def test_cross_entropy_is_of_the_row_and_what_it_lost() -> None:
    given = rows([[3, 4], [1, 2], [0, 0]], [[0.75, 0.25], [0.5, 0.5], [0.0, 0.0]], [0.8, 0.9, 0.0])
    found = given.cross_entropy(torch.tensor([3, 7, 1]), 10)
    assert float(found[0]) == pytest.approx(-math.log(0.75 * 0.8 + 0.2 / 10))
    assert float(found[1]) == pytest.approx(-math.log(0.1 / 10), rel=1e-5)
    assert math.isnan(float(found[2]))


def test_the_same_tokenizer_is_carried_unchanged_and_covers_everything(tmp_path: Path) -> None:
    tokenizer = byte_level()
    teacher = Teacher(model(len(tokenizer)), byte_level())
    out = fuse([teacher], DATA, tokenizer, tmp_path / "rows", top_k=6, template=False)
    assert out.known == 1.0 and out.examples == len(DATA)
    cache, items = CachedRows(out.path), encoded(tokenizer)
    own = teacher_rows(teacher.model, items, top_k=6)
    for item, wanted in zip(items, own, strict=True):
        ids, shares = cache.of(key_of_example(item.input_ids, item.labels))
        assert torch.equal(ids, wanted.ids)
        torch.testing.assert_close(shares, wanted.shares)
    assert out.labels == sum(item.trained for item in items)
    assert out.mass == pytest.approx(float(torch.cat([r.mass for r in own]).mean()))


def test_another_tokenizer_keeps_what_both_cut_alike(tmp_path: Path) -> None:
    target, other = byte_level(size=275), metaspace()
    teacher = Teacher(model(len(other)), other, name="other")
    told = {}
    for vocabulary in ("exact", "edit", "counts"):
        path = tmp_path / vocabulary
        out = fuse([teacher], DATA, target, path, template=False, vocabulary=vocabulary)
        told[vocabulary] = out
        for item in encoded(target):
            ids, shares = CachedRows(path).of(key_of_example(item.input_ids, item.labels))
            total = shares.sum(-1)
            assert torch.all(((total - 1).abs() < 1e-5) | (total == 0))
            assert len(total) == item.trained
            assert int(ids.max()) < len(target)
    assert 0.2 < told["edit"].known < 1
    assert told["exact"].mass < told["edit"].mass and told["exact"].mass < told["counts"].mass
    assert told["edit"].teachers["other"]["part"] == 1.0


def test_long_texts_fall_into_pieces_that_all_find_their_rows(tmp_path: Path) -> None:
    tokenizer = byte_level()
    teacher = Teacher(model(len(tokenizer)), byte_level())
    data = [{"text": " ".join(TEXT)}]
    out = fuse([teacher], data, tokenizer, tmp_path / "r", max_length=16)
    pieces = encode_all(read_examples(data), tokenizer, 16).items
    assert out.examples == len(pieces) > 3 and out.known == 1.0
    whole = encode_all(read_examples(data), tokenizer, 256).items[0]
    (own,) = teacher_rows(teacher.model, [whole])
    _, shares = CachedRows(out.path).of(key_of_example(pieces[1].input_ids, pieces[1].labels))
    torch.testing.assert_close(shares, own.shares[16:31])  # 15 + the piece's first, which has none


# -- of several teachers --------------------------------------------------------------------------


def several() -> tuple[list[Distributions], Tensor]:
    labels = torch.tensor([1, 2])
    sure = rows([[1, 0], [2, 0]], [[0.9, 0.1], [0.8, 0.2]], [1.0, 1.0])
    half = rows([[1, 3], [3, 2]], [[0.5, 0.5], [0.6, 0.4]], [1.0, 1.0])
    mute = rows([[0, 0], [0, 0]], [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    return [half, sure, mute], labels


def test_min_ce_takes_the_teacher_of_least_cross_entropy() -> None:
    teachers, labels = several()
    found, part = fuse_distributions(teachers, labels, 10)
    assert found is teachers[1] and part.tolist() == [0.0, 1.0, 0.0]


def test_avg_ce_weighs_by_the_softmax_of_minus_cross_entropy() -> None:
    teachers, labels = several()
    found, part = fuse_distributions(teachers, labels, 10, "avg-ce", top_k=3)
    ce = [float(t.cross_entropy(labels, 10).mean()) for t in teachers[:2]]
    a, b = (math.exp(-c) for c in ce)
    assert part.tolist() == pytest.approx([a / (a + b), b / (a + b), 0.0])
    w = float(part[0])
    dense = torch.zeros(10).scatter_add(0, found.ids[0], found.shares[0])
    wanted = {0: 0.1 * (1 - w), 1: 0.5 * w + 0.9 * (1 - w), 3: 0.5 * w}
    for index, share in wanted.items():
        assert float(dense[index]) == pytest.approx(share, rel=1e-5)
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(2))


def test_a_label_that_one_teacher_knows_has_that_teacher_s_row() -> None:
    teachers, labels = several()
    gap = rows([[1, 0], [0, 0]], [[0.9, 0.1], [0.0, 0.0]], [1.0, 0.0])
    found, _ = fuse_distributions([teachers[0], gap], labels, 10, "avg-ce")
    torch.testing.assert_close(found.shares[1], teachers[0].shares[1])
    nothing, part = fuse_distributions([teachers[2]], labels, 10)
    assert not nothing.known.any() and not part.any()
    with pytest.raises(PlaitError, match="way to fuse"):
        fuse_distributions(teachers, labels, 10, "median")


# -- the file -------------------------------------------------------------------------------------


def test_rows_are_found_whatever_the_order_padding_and_packing(tmp_path: Path) -> None:
    items = encoded(byte_level())
    stored = {}
    for n, item in enumerate(items):
        ids = torch.full((item.trained, 2), n)
        stored[key_of_example(item.input_ids, item.labels)] = (ids, torch.full(ids.shape, 0.5))
    path = write_rows(tmp_path / "rows.safetensors", stored, {"how": "test"})
    cache = CachedRows(path)
    assert cache.facts == {"how": "test"} and len(cache) == len(items)

    def counts(order: list[int]) -> list[int]:
        return [n for n in order for _ in range(items[n].trained)]

    order = [4, 0, 5, 2]
    ids, shares = cache.find(Collator(0)([items[n] for n in order]))
    assert ids[:, 0].tolist() == counts(order) and ids.dtype == torch.long
    assert torch.all(shares == 0.5)
    packed = pack(items, 64)
    ids, _ = cache.find(Collator(0)(packed))
    keys = [key_of_example(item.input_ids, item.labels) for item in items]
    order = [
        keys.index(key)
        for e in examples_in(Collator(0)(packed))
        if (key := key_of_example(*e)) in keys
    ]
    assert sorted(order) == list(range(len(items))) and len(packed) < len(items)
    assert ids[:, 0].tolist() == counts(order)
    with pytest.raises(PlaitError, match="no rows for an example"):
        cache.find({"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()})


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("rows")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors"):
        with pytest.raises(FormatError):
            CachedRows(tmp_path / name)
    with pytest.raises(PlaitError, match="does not exist"):
        CachedRows(tmp_path / "none")
    with pytest.raises(PlaitError, match="no rows to write"):
        write_rows(tmp_path / "none", {}, {})


# -- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_plain_distillation_where_every_token_is_kept() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(7, 11, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 11, generator=g, dtype=torch.float64).softmax(-1)
    labels = torch.randint(11, (7,), generator=g)
    order = torch.argsort(torch.rand(7, 11, generator=g), -1)
    shares = teacher.gather(-1, order)
    log_p = z.log_softmax(-1)
    kl = nn.functional.kl_div(log_p, teacher, reduction="batchmean")
    ce = nn.functional.cross_entropy(z, labels)
    wanted = 0.9 * ce + 0.1 * kl
    found = ce + 0.1 * sparse_excess(z, labels, order, shares)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    a, b = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (found, wanted))
    torch.testing.assert_close(a, b)


def test_labels_without_a_row_count_alone() -> None:
    z, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    ids, shares = torch.zeros(4, 2).long(), torch.zeros(4, 2)
    assert float(sparse_excess(z, labels, ids, shares)) == 0
    ids[0], shares[0] = torch.tensor([5, 1]), torch.tensor([0.25, 0.75])
    log_p = z.log_softmax(-1)[0]
    q = torch.tensor([0.25, 0.75]).double()
    kl = float((q * (q.log() - log_p[ids[0]])).sum())
    wanted = (kl + float(log_p[0])) / 4
    assert float(sparse_excess(z, labels, ids, shares)) == pytest.approx(wanted)
    with pytest.raises(PlaitError, match="tokens that the model does not have"):
        sparse_excess(z, labels, ids + 9, shares)
    with pytest.raises(PlaitError, match="4 labels"):
        sparse_excess(z, labels, ids[:2], shares[:2])


def losses(net: nn.Module, tokenizer, rule: Distil | str, steps: int = 12) -> list[float]:
    adapter = plait.attach(net, "lora", rank=4, targets="all-linear", seed=1)
    net.train()
    run = plait.RuleStack(net, [rule], lr=2e-2, total_steps=steps)
    batch, seen = Collator(0)(encoded(tokenizer)), []
    for _ in range(steps):
        loss = net(**batch).loss
        total = loss + run.extra_loss()
        total.backward()
        run.step()
        seen.append(float(total.detach()))
    run.finish()
    assert adapter.num_parameters()
    return seen


def test_the_rule_s_loss_is_the_formula_on_a_padded_batch(tmp_path: Path) -> None:
    tokenizer = byte_level()
    teacher, net = model(len(tokenizer), seed=3), model(len(tokenizer))
    vocabulary = len(tokenizer)
    out = fuse(
        [Teacher(teacher, byte_level())], DATA, tokenizer, tmp_path / "rows", top_k=vocabulary,
        template=False,
    )  # fmt: skip
    first = losses(net, tokenizer, Distil(rows=str(out.path), ce=0.7), steps=1)[0]
    plait.detach(net, "default")
    batch = Collator(0)(encoded(tokenizer))
    with torch.no_grad():
        z, t = (m.eval()(**batch).logits[:, :-1] for m in (net, teacher))
    wanted = batch["labels"][:, 1:]
    here = wanted != IGNORE
    ce = nn.functional.cross_entropy(z[here], wanted[here])
    kl = nn.functional.kl_div(z[here].log_softmax(-1), t[here].softmax(-1), reduction="batchmean")
    assert first == pytest.approx(float(0.7 * ce + 0.3 * kl), rel=1e-4)


def test_without_a_file_the_base_is_the_teacher() -> None:
    tokenizer = byte_level()
    seen = losses(model(len(tokenizer)), tokenizer, Distil(ce=0.0), steps=4)
    assert seen[0] == pytest.approx(0, abs=1e-5), "an adapter that starts at 0 answers as the base"
    assert losses(model(len(tokenizer)), tokenizer, "distil")[-1] < 5
    with pytest.raises(PlaitError, match="share"):
        Distil(ce=1.5)


def test_two_teachers_of_other_tokenizers_teach_in_the_target_s_tokens(tmp_path: Path) -> None:
    target = byte_level()
    net = model(len(target))
    one, two = metaspace(), byte_level(size=300)
    teachers = [
        Teacher(model(len(one), 1), one, "one"),
        Teacher(model(len(two), 2), two, "two"),
    ]
    for how in ("min-ce", "avg-ce"):
        out = fuse(teachers, DATA, target, tmp_path / how, how=how, template=False)
        parts = [told["part"] for told in out.teachers.values()]
        assert sum(parts) == pytest.approx(1.0) and list(out.teachers) == ["one", "two"]
    seen = losses(net, target, Distil(rows=str(tmp_path / "avg-ce"), ce=0.5), steps=25)
    assert seen[-1] < 0.7 * seen[0]


@pytest.mark.smollm2
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2-135M is not on disk")
def test_the_tokenizer_of_smollm2_teaches_one_trained_here(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    real, target = AutoTokenizer.from_pretrained(SMOLLM2), byte_level()
    assert len(real) > 40_000
    teacher = Teacher(model(len(real)), real)
    out = fuse([teacher], DATA, target, tmp_path / "rows", template=False, top_k=4)
    assert 0.3 < out.known < 1 and 0 < out.mass < 1
    seen = losses(model(len(target)), target, Distil(rows=str(out.path), ce=0.5))
    assert seen[-1] < 0.7 * seen[0]
    assert labels_of(encoded(target)[0]).dtype == torch.long


@pytest.mark.parametrize("packing", [False, True])
def test_a_recipe_trains_on_the_rows_of_a_file(tmp_path: Path, packing: bool) -> None:
    from plait.training.recipe import Recipe
    from plait.training.trainer import train

    tokenizer, data = byte_level(), DATA[-1:] * 2 + DATA[:3]
    other = metaspace()
    teacher = Teacher(model(len(other), 1), other)
    path = fuse([teacher], data, tokenizer, tmp_path / "rows", template=False, max_length=64).path
    seen = {}
    for rules in ([], [{"distil": {"rows": str(path), "ce": 0.5}}]):
        recipe = Recipe.make(
            {
                "output": str(tmp_path / f"out{len(rules)}"),
                "options": {"rank": 2},
                "rules": rules,
                "template": False,
                "max_length": 64,
                "packing": packing,
                "batch_size": 2,
                "steps": 3,
                "lr": 1e-2,
                "parity": False,
                "show_examples": 0,
            }
        )
        result = train(
            recipe, model=model(len(tokenizer)), tokenizer=tokenizer, data=data, quiet=True
        )
        adapter = plait.read_adapter(tmp_path / f"out{len(rules)}" / "adapter")
        seen[len(rules)] = torch.cat([p.detach().flatten() for p in adapter.parameters()])
        assert result is not None
    assert not torch.allclose(seen[0], seen[1])
