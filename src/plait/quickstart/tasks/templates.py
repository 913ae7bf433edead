"""Drawing one random sentence, with its slots, from a hassil sentence template.

hassil itself enumerates every sentence of a template, which is millions for some; this walks the
parsed template once, taking a random branch at each choice, and notes the values it put in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any


class Rejected(Exception):
    """This branch gives no sensible sentence; draw again."""


class Drawing:
    """One sentence in the making: its text so far and the slots filled.

    `rules` and `lists` are hassil's expansion rules and slot lists by name; `choose(list_name,
    values, text)` may narrow the values of a list, given the text before them.
    """

    def __init__(
        self,
        draw: random.Random,
        rules: Mapping[str, Any],
        lists: Mapping[str, Any],
        choose: Callable[[str, list[Any], str], list[Any]],
    ) -> None:
        self.draw, self.rules, self.lists, self.choose = draw, rules, lists, choose
        self.text = ""
        self.slots: dict[str, Any] = {}

    def expand(self, node: Any) -> None:
        """Appends a random reading of `node` (a hassil Expression)."""
        from hassil import expression as hassil

        if isinstance(node, hassil.TextChunk):
            self.text += node.original_text
        elif isinstance(node, hassil.Alternative):
            self.expand(self.draw.choice(node.items))
        elif isinstance(node, hassil.Permutation):
            for item in self.draw.sample(node.items, len(node.items)):
                self.text += " "
                self.expand(item)
        elif isinstance(node, hassil.Sequence):
            for item in node.items:
                self.expand(item)
        elif isinstance(node, hassil.RuleReference):
            self.expand(self.rules[node.rule_name].expression)
        elif isinstance(node, hassil.ListReference):
            self._fill(node.list_name, node.slot_name)
        else:
            raise TypeError(f"hassil template: unknown node {type(node).__name__}")

    def _fill(self, list_name: str, slot: str) -> None:
        from hassil.intents import RangeSlotList, TextSlotList

        slots = self.lists[list_name]
        if isinstance(slots, RangeSlotList):
            value = self.draw.choice(list(slots.get_numbers()))
            self.text += str(value)
        elif isinstance(slots, TextSlotList):
            values = self.choose(list_name, slots.values, self.text)
            if not values:
                raise Rejected(list_name)
            chosen = self.draw.choice(values)
            self.expand(chosen.text_in)
            value = chosen.value_out
        else:
            raise TypeError(f"hassil template: list {list_name!r} has no values to draw from")
        if self.slots.setdefault(slot, value) != value:
            raise Rejected(slot)
