"""Spoken home commands to JSON function calls, in two languages.

    "turn on the desk lamp"  ──►  {"intent": "HassTurnOn", "name": "desk lamp"}

The sentences come from the templates of the package home-assistant-intents (Apache-2.0), the
household from `home_words`. Train and test share no template: a test sentence is one that the
training rows never showed in this wording. The metric is the exact match of the parsed JSON.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from plait.quickstart.tasks.home_words import ENGLISH, GERMAN, Words
from plait.quickstart.tasks.task import Row, Task, reference, row
from plait.quickstart.tasks.templates import Drawing, Rejected

SYSTEM = "Home control. Answer in JSON."
TRAIN_ROWS, TEST_ROWS = 1000, 120
WORDS = {"en": ENGLISH, "de": GERMAN}

# Which blocks of templates are taken, by intent and slot combination, and for which domains.
TAKEN: dict[str, tuple[str, ...]] = {
    "HassTurnOn": ("area_domain", "name_only", "area_device_class_cover"),
    "HassTurnOff": ("area_domain", "name_only", "area_device_class_cover"),
    "HassLightSet": ("area_brightness", "area_color", "name_brightness", "name_color"),
    "HassClimateSetTemperature": ("area_temperature", "temperature_only"),
    "HassClimateGetTemperature": ("area_only",),
    "HassFanSetSpeed": ("name_only", "area_only"),
    "HassSetPosition": ("name_only",),
    "HassStartTimer": ("minutes_only", "hours_only"),
    "HassCancelTimer": ("minutes_only",),
    "HassShoppingListAddItem": ("item_only",),
    "HassGetWeather": ("default", "name_only"),
    "HassMediaPause": ("area_only", "name_only"),
    "HassMediaNext": ("area_only", "name_only"),
    "HassSetVolume": ("area_only", "name_only"),
    "HassVacuumStart": ("name_only", "area_only"),
}
DOMAINS = {"light", "switch", "fan", "cover", "media_player", "vacuum", "weather"}
RANGES = {
    **dict.fromkeys(("brightness", "position", "fan_speed", "volume"), range(5, 101, 5)),
    "volume_level": range(5, 101, 5),
    "temperature": range(15, 29),
    "timer_minutes": range(2, 60),
    "timer_hours": range(2, 24),
}
FIRST_KEYS = ("intent", "name", "area", "domain", "device_class")


@dataclass(frozen=True)
class Template:
    """One sentence template with what its block says about it."""

    intent: str
    text: str
    tree: Any
    slots: Mapping[str, Any]
    domains: frozenset[str]


def generate(language: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and test rows; no template, no sentence in both."""
    draw = random.Random(f"home/{language}/{seed}")
    templates, drawing = _load(language)
    train_part, test_part = split(templates, draw)
    train = _sentences(train_part, TRAIN_ROWS, draw, drawing, language, taken={})
    test = _sentences(test_part, TEST_ROWS, draw, drawing, language, taken=train)
    return [_row(*pair) for pair in train.items()], [_row(*pair) for pair in test.items()]


def split(templates: list[Template], draw: random.Random) -> tuple[list[Template], list[Template]]:
    """A fifth of each intent's templates, at least one of several, is held out.

    Templates are told apart by their text: where two blocks of an intent share one, both go to the
    same side.
    """
    held: set[tuple[str, str]] = set()
    for intent in TAKEN:
        texts = sorted({template.text for template in templates if template.intent == intent})
        count = max(1, round(len(texts) / 5)) if len(texts) > 1 else 0
        held.update((intent, text) for text in draw.sample(texts, count))
    train = [item for item in templates if (item.intent, item.text) not in held]
    test = [item for item in templates if (item.intent, item.text) in held]
    return train, test


def score(prediction: str, row: Mapping[str, Any]) -> bool:
    """Whether the prediction is JSON and means the same as the reference (key order aside)."""
    try:
        return json.loads(prediction) == json.loads(reference(row))
    except (json.JSONDecodeError, RecursionError):
        return False


def _sentences(
    templates: list[Template],
    count: int,
    draw: random.Random,
    drawing: Any,
    language: str,
    taken: Mapping[str, str],
) -> dict[str, str]:
    """`count` sentences with their answers, none of them in `taken`, intents about evenly mixed."""
    by_intent: dict[str, list[Template]] = {}
    for template in templates:
        by_intent.setdefault(template.intent, []).append(template)
    # An intent with more ways to say it deserves more rows, but not in proportion.
    weights = [len({item.text for item in group}) ** 0.5 for group in by_intent.values()]
    found: dict[str, str] = {}
    ambiguous: set[str] = set()
    for _ in range(200 * count):
        if len(found) == count:
            return found
        template = draw.choice(draw.choices(list(by_intent.values()), weights)[0])
        sentence, answer = drawing(template, draw)
        if not sentence or sentence in taken or sentence in ambiguous:
            continue
        if found.setdefault(sentence, answer) != answer:
            ambiguous.add(sentence)
            del found[sentence]
    raise RuntimeError(
        f"home_{language}: the templates give only {len(found)} of {count} sentences"
    )


def _load(language: str) -> tuple[list[Template], Any]:
    try:
        from hassil.intents import Intents
        from home_assistant_intents import get_intents
    except ImportError as error:
        raise ImportError(
            "the home tasks need hassil and home-assistant-intents; run `pip install 'plait[demo]'`"
        ) from error
    data = get_intents(language)
    if data is None:
        raise RuntimeError(f"home-assistant-intents has no data for {language!r}")
    data = {**data, "intents": {name: data["intents"][name] for name in TAKEN}}
    intents = Intents.from_dict(data)
    words = WORDS[language]
    rules = {**intents.expansion_rules, **_rules(words)}
    lists = {**intents.slot_lists, **_lists(words)}
    return list(_templates(intents)), partial(_draw, rules=rules, lists=lists, words=words)


def _templates(intents: Any) -> Iterator[Template]:
    for intent, combinations in TAKEN.items():
        for block in intents.intents[intent].data:
            if (block.metadata or {}).get("slot_combination") not in combinations:
                continue
            domains = block.requires_context.get("domain", ())
            domains = frozenset([domains] if isinstance(domains, str) else domains)
            if domains and not domains & DOMAINS:
                continue
            for text, sentence in zip(block.sentence_texts, block.sentences, strict=True):
                yield Template(intent, text, sentence.expression, block.slots, domains)


def _draw(
    template: Template,
    draw: random.Random,
    rules: Mapping[str, Any],
    lists: Mapping[str, Any],
    words: Words,
) -> tuple[str, str]:
    """A sentence and its JSON, or two empty strings where the draw came out badly."""

    def choose(list_name: str, values: list[Any], before: str) -> list[Any]:
        if list_name != "name":
            return values
        word = before.split()[-1].lower() if before.split() else ""
        return [
            value
            for value in values
            if value.metadata["domain"] in template.domains
            and (word not in ARTICLES or word in value.metadata["articles"])
        ]

    drawing = Drawing(draw, rules, lists, choose)
    try:
        drawing.expand(template.tree)
    except Rejected:
        return "", ""
    sentence = " ".join(drawing.text.split())
    if len(sentence.split()) < 3 or re.search(words.reject, sentence):
        return "", ""
    call = {"intent": template.intent, **template.slots, **drawing.slots}
    keys = [key for key in FIRST_KEYS if key in call]
    keys += sorted(call.keys() - set(keys))
    answer = {key: call[key] for key in keys}
    # No spaces: a fifth fewer tokens to train on and to generate.
    return sentence, json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


# What may stand before a name of each gender: the accusative, and what a dative contracts to.
BEFORE = {
    "der": ("den", "vom", "am", "zum", "im"),
    "die": ("die",),
    "das": ("das", "vom", "am", "zum", "im"),
    "": ("the", "my", "our"),
}
ARTICLES = {"der", "des", "dem"}.union(*BEFORE.values())


def _rules(words: Words) -> dict[str, Any]:
    from hassil.parse_expression import parse_sentence

    return {name: parse_sentence(text) for name, text in words.rules.items()}


def _lists(words: Words) -> dict[str, Any]:
    from hassil.intents import RangeSlotList, TextSlotList

    names: list[tuple[str, str, dict, dict]] = []
    for domain, entries in words.names.items():
        for entry in entries if domain != "weather" else words.places:
            article, _, name = entry.rpartition("|")
            facts = {"domain": domain, "articles": BEFORE[article] if domain != "weather" else ()}
            names.append((name, name, {}, facts))
    ranges = {
        name: RangeSlotList(name, numbers.start, numbers.stop - 1, numbers.step, words=False)
        for name, numbers in RANGES.items()
    }
    return {
        **ranges,
        "name": TextSlotList.from_tuples(names, name="name"),
        "area": TextSlotList.from_strings(words.areas, name="area"),
        "area_phrase": TextSlotList.from_tuples(words.area_phrases.items(), name="area_phrase"),
        "shopping_list_item": TextSlotList.from_strings(words.items, name="shopping_list_item"),
    }


def _row(sentence: str, answer: str) -> Row:
    return row(SYSTEM, sentence, answer)


def home_task(language: str, title: str) -> Task:
    return Task(
        name=f"home_{language}",
        title=title,
        language=language,
        metric="exact match of the JSON",
        max_new_tokens=64,
        generate=partial(generate, language),
        score=score,
    )
