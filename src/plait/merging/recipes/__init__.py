"""Merge recipes: YAML files, mergekit's documented ones as they are, read, resolved and run.

    file ──► schema (checked, by line) ──► stretches of layers ──► a task a tensor ──► the engine

`dialect` holds what mergekit's methods mean in terms of Plait's.
"""

from plait.merging.recipes.reading import parse_recipe, read_recipe
from plait.merging.recipes.running import Merged, merge_recipe
from plait.merging.recipes.schema import Recipe

__all__ = ["Merged", "Recipe", "merge_recipe", "parse_recipe", "read_recipe"]
