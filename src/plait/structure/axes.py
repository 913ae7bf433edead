"""Axes: what a tensor's dimensions are made of, refined and unified as operations tell more.

A dimension is a product of axes, outermost first: the 576 outputs of a query projection are one
axis until a view cuts them into 9 heads of 64, and the 9 become 3 x 3 when they meet 3 key heads
that were each copied 3 times. An axis that is cut stays, as the product of its parts, wherever it
stands; axes that meet become one (union-find).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Dim = list["Axis"]
"""The axes of one dimension, outermost first; none for a dimension of size 1."""


class Axis:
    """One factor of some dimensions. `held`: why its units cannot be taken out ("" if they can);
    `mixed`: what computes over all its units together, a norm or a mean."""

    __slots__ = ("_link", "_parts", "held", "mixed", "size")

    def __init__(self, size: int, held: str = "") -> None:
        self.size, self.held, self.mixed = size, held, ""
        self._link: Axis | None = None
        self._parts: tuple[Axis, Axis] | None = None

    def root(self) -> Axis:
        axis = self
        while axis._link is not None:
            axis = axis._link
        if axis is not self:
            self._link = axis
        return axis

    def cut(self, outer: int) -> tuple[Axis, Axis]:
        """This whole axis as (outer, size / outer); it must not have been cut before."""
        parts = Axis(outer, self.held), Axis(self.size // outer, self.held)
        for part in parts:
            part.mixed = self.mixed
        self._parts = parts
        return parts

    def unite(self, other: Axis) -> None:
        """Make two uncut axes of one size the same."""
        if other is not self:
            self.held = self.held or other.held
            self.mixed = self.mixed or other.mixed
            other._link = self


def dim(size: int, held: str = "") -> Dim:
    """A dimension that is one new axis."""
    return [Axis(size, held)] if size != 1 else []


def leaves(axes: Iterable[Axis]) -> Dim:
    """The uncut axes that these are made of, in order."""
    found: Dim = []
    for axis in axes:
        root = axis.root()
        found += [root] if root._parts is None else leaves(root._parts)
    return found


def hold(axes: Iterable[Axis], why: str) -> None:
    for axis in leaves(axes):
        axis.held = axis.held or why


def mix(axes: Iterable[Axis], what: str) -> None:
    for axis in leaves(axes):
        axis.mixed = axis.mixed or what


def join(one: Sequence[Axis], two: Sequence[Axis], where: str) -> None:
    """Make two dimensions of one size the same, cutting either where the other is cut."""
    left, right = leaves(one)[::-1], leaves(two)[::-1]
    while left and right:
        a, b = left.pop().root(), right.pop().root()
        if a._parts is not None or b._parts is not None:  # cut a moment ago, further inside
            left += leaves([a])[::-1]
            right += leaves([b])[::-1]
        elif a.size == b.size:
            a.unite(b)
        elif a.size > b.size and a.size % b.size == 0:
            left += a.cut(b.size)[::-1]
            right.append(b)
        elif b.size % a.size == 0:
            right += b.cut(a.size)[::-1]
            left.append(a)
        else:
            why = f"{where} meets it with an axis of another structure"
            hold([a, b, *left, *right], why)
            return


def regroup(axes: Iterable[Axis], sizes: Sequence[int]) -> list[Dim] | None:
    """The same entries as dimensions of these sizes (a view); None where no cut fits."""
    rest, found = leaves(axes)[::-1], []
    for size in sizes:
        here: Dim = []
        while size > 1:
            if not rest:
                return None
            axis = rest.pop()
            if size % axis.size == 0:
                here.append(axis)
                size //= axis.size
            elif axis.size % size == 0:
                outer, inner = axis.cut(size)
                here.append(outer)
                rest.append(inner)
                size = 1
            else:
                return None
        found.append(here)
    return None if rest else found
