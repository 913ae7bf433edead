"""The tasks: eight to train experts on, eight that none of them saw, five that ask for the base.

Every row becomes a text and the texts of its options; the model answers with the option nearest to
the text (see `scorer`). So no task has a head of its own, and any merge can be asked any task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.tasks import bigbench, emoji, home, kjv, spam, udhr
from benchmarks.tasks.rows import Row, split

Kind = Literal["held-in", "held-out", "general"]


@dataclass(frozen=True)
class Task:
    """A task: `rows` loads it, `text` and `labels` word its rows and options for the encoder."""

    name: str
    kind: Kind
    rows: Callable[[], list[Row]]
    labels: Mapping[str, str] = field(default_factory=dict)
    """{option: the text that stands for it}; options that are not named stand for themselves."""
    text: Callable[[str], str] = str

    def parts(self, train: int, validation: int, test: int) -> dict[str, list[Row]]:
        """At most so many rows of each split, classes as even as they can be."""
        found = split(self.rows(), validation=0.15, test=0.25 if self.kind == "held-in" else 0.85)
        return {
            "train": even(found["train"], train),
            "validation": even(found["validation"], validation),
            "test": even(found["test"], test),
        }


def even(rows: Iterable[Row], count: int) -> list[Row]:
    """The first rows of each answer in turn, until there are `count`.

    Where every row has options of its own this is simply the first `count`.
    """
    queues: dict[str, list[Row]] = {}
    known = list(rows)
    shared = len({tuple(row["choices"]) for row in known}) == 1
    for row in known:
        queues.setdefault(row["answer"] if shared else "", []).append(row)
    found: list[Row] = []
    turn = 0
    while len(found) < min(count, len(known)):
        found += [queue[turn] for queue in queues.values() if turn < len(queue)]
        turn += 1
    return found[:count]


def _goal(prompt: str) -> str:
    return prompt.split("'", 1)[-1].rsplit("'", 1)[0]


def _category(name: str) -> str:
    return name.replace("-", " ").replace("&", "and").lower()


FEELING = {
    "positive": "a positive opinion",
    "negative": "a negative opinion",
    "ambivalent": "a mixed opinion, both good and bad",
    "neutral": "a neutral statement without opinion",
}
MAIL = {"spam": "spam, an unwanted advertisement", "ham": "an ordinary message between people"}
SUPPORT = {
    "supportive": "a supportive, kind comment",
    "unsupportive": "an unsupportive, unkind comment",
    "neutral": "a neutral comment",
}
BOOKS = ("Genesis", "Leviticus", "Psalms", "Proverbs", "Isaiah", "Matthew", "Acts", "Revelation")
OTHER_BOOKS = ("Exodus", "Ecclesiastes", "Ezekiel", "Luke", "Romans", "Daniel")
_LANGUAGES = "eng deu_1996 fra spa ita nld por_PT swe pol ces hun fin tur ron_2006 ind vie"
_OTHERS = "dan nob cat slk hrv est lav lit afr isl eus swh"
LANGUAGES, OTHER_LANGUAGES = tuple(_LANGUAGES.split()), tuple(_OTHERS.split())
CATEGORIES = {
    c: _category(c)
    for c in (
        "People & Body",
        "Flags",
        "Objects",
        "Symbols",
        "Travel & Places",
        "Smileys & Emotion",
        "Animals & Nature",
        "Food & Drink",
        "Activities",
    )
}
_INTENTS = (
    "add_to_playlist book_restaurant get_weather play_music search_screening_event "
    "search_creative_work rate_book"
)


def _languages(names: Iterable[str]) -> dict[str, str]:
    return {udhr.declaration(code)[0]: udhr.declaration(code)[0].split(" (")[0] for code in names}


def all_tasks() -> list[Task]:
    """Every task, held-in first."""
    big = bigbench.rows
    return [
        Task(
            "intent",
            "held-in",
            lambda: big("intent_recognition"),
            {i: i.replace("_", " ") for i in _INTENTS.split()},
            lambda p: p.removeprefix("Utterance: "),
        ),
        Task("sentiment", "held-in", lambda: big("multiemo/products_sentence_en"), FEELING),
        Task("home", "held-in", home.rows, {i: _words(i) for i in _intents()}),
        Task("spam", "held-in", lambda: spam.rows("easy"), MAIL),
        Task("language", "held-in", lambda: udhr.rows(LANGUAGES), _languages(LANGUAGES)),
        Task("emoji", "held-in", emoji.rows, CATEGORIES),
        Task("book", "held-in", lambda: kjv.rows(BOOKS), {b: f"the book of {b}" for b in BOOKS}),
        Task("support", "held-in", lambda: big("social_support"), SUPPORT),
        Task("sentiment-hotels", "held-out", lambda: big("multiemo/hotels_sentence_en"), FEELING),
        Task("sentiment-german", "held-out", lambda: big("multiemo/products_sentence_de"), FEELING),
        Task(
            "home-german", "held-out", lambda: home.rows("de"), {i: _words(i) for i in _intents()}
        ),
        Task("spam-later", "held-out", lambda: spam.rows("hard"), MAIL),
        Task(
            "language-others",
            "held-out",
            lambda: udhr.rows(OTHER_LANGUAGES),
            _languages(OTHER_LANGUAGES),
        ),
        Task(
            "emoji-finer",
            "held-out",
            lambda: emoji.rows("subcategory", ("Food & Drink", "Animals & Nature")),
            {r: _category(r) for r in _finer()},
        ),
        Task(
            "book-others",
            "held-out",
            lambda: kjv.rows(OTHER_BOOKS),
            {b: f"the book of {b}" for b in OTHER_BOOKS},
        ),
        Task(
            "metaphor",
            "held-out",
            lambda: big("metaphor_boolean"),
            {"True": "both mean the same", "False": "they mean different things"},
        ),
        Task("goals", "general", lambda: big("goal_step_wikihow/goal_inference"), {}, _goal),
        Task("steps", "general", lambda: big("goal_step_wikihow/step_inference"), {}, _goal),
        Task("phrases", "general", lambda: big("phrase_relatedness")),
        Task("alike", "general", lambda: big("similarities_abstraction")),
        Task("social", "general", lambda: big("social_iqa")),
    ]


def _intents() -> list[str]:
    return home.rows()[0]["choices"]


def _words(intent: str) -> str:
    """ "HassTurnOn" as "turn on"."""
    return re.sub("([A-Z])", r" \1", intent.removeprefix("Hass")).strip().lower()


def _finer() -> list[str]:
    return emoji.rows("subcategory", ("Food & Drink", "Animals & Nature"))[0]["choices"]
