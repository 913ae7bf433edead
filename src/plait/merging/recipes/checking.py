"""Whether a recipe's method and parameters are known, and which of them have an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from plait.errors import PlaitError, unknown
from plait.merging.method import merge_method_names
from plait.merging.recipes.dialect import DIALECT, Dialect
from plait.merging.recipes.native import native
from plait.merging.recipes.schema import Recipe

IGNORED = frozenset({"int8_mask", "embed_slerp"})
"""Parameters that only say how mergekit saves memory, or that it no longer reads."""
Trail = tuple[str | int, ...]


class MisnamedError(PlaitError):
    """A name that does not exist, and where it stands in the recipe."""

    def __init__(self, trail: Trail, message: str) -> None:
        super().__init__(message)
        self.trail = trail


def dialect_of(recipe: Recipe, space: str | None = "delta") -> Dialect:
    """What the recipe's method means; an unknown name names the nearest."""
    if recipe.method is not None:
        try:
            return native(recipe.method, space)
        except PlaitError as error:
            raise MisnamedError(("method",), str(error)) from None
    assert recipe.merge_method is not None
    key = recipe.merge_method.lower().replace("-", "_")
    if key in DIALECT:
        return DIALECT[key]
    message = str(unknown("merge_method", recipe.merge_method, DIALECT))
    if key.replace("_", "-") in merge_method_names():
        message = f"{key} is a method of Plait's own; write method: instead of merge_method:."
    raise MisnamedError(("merge_method",), message)


def check_names(recipe: Recipe, dialect: Dialect) -> list[str]:
    """Notes on parameters without effect; MisnamedError for one that no method knows."""
    everywhere = {n for d in DIALECT.values() for n in d.each | d.shared} | IGNORED
    method, notes = recipe.wanted_method, []
    for trail, single, names in _levels(recipe):
        known = dialect.each if single else dialect.each | dialect.shared
        for name in names:
            if name in IGNORED:
                notes.append(f"{name} does nothing here.")
            elif name not in known and name not in everywhere | dialect.shared:
                message = str(unknown("parameter", name, known - IGNORED, where=method))
                raise MisnamedError((*trail, name), message)
            elif name not in known:
                where = "for a single model " if single else ""
                notes.append(f"{name} has no effect {where}with {method}.")
    return list(dict.fromkeys(notes))


def _levels(recipe: Recipe) -> Iterator[tuple[Trail, bool, Mapping[str, object]]]:
    """(where they stand, whether they are of a single model, parameters) throughout a recipe."""
    yield ("parameters",), False, recipe.parameters
    for name, given in recipe.input_model_parameters.items():
        yield ("input_model_parameters", name), True, given
    for module, body in recipe.bodies().items():
        start: Trail = () if module is None else ("modules", module)
        if module is not None:
            yield (*start, "parameters"), False, body.parameters
        for i, entry in enumerate(body.models or ()):
            yield (*start, "models", i, "parameters"), True, entry.parameters
        for i, piece in enumerate(body.slices or ()):
            here = (*start, "slices", i)
            yield (*here, "parameters"), False, piece.parameters
            for j, source in enumerate(piece.sources):
                yield (*here, "sources", j, "parameters"), True, source.parameters
