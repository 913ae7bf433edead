"""Every registered method through every property of the kit; a failure names both."""

from typing import Any

import pytest

from plait.adapter import get_method, method_names
from plait.testing import CHECKS, Case, NotApplicable, cases


def _parameters() -> list[Any]:
    found: list[Any] = []
    for name in method_names():
        try:
            method = get_method(name)
        except Exception as e:  # a file that does not import is that method's failure alone
            found.append(pytest.param("import", e, id=f"{name}-import"))
            continue
        if method.delta is None and method.choose is None:
            continue
        for check, case in cases(method):
            found.append(pytest.param(check, case, id=f"{name}-{_where(case)}-{check}"))
    return found


def _where(case: Case) -> str:
    return f"{case.kind}-{str(case.dtype).removeprefix('torch.')}"


@pytest.mark.parametrize(("check", "case"), _parameters())
def test_method(check: str, case: Case | Exception) -> None:
    if isinstance(case, Exception):
        raise case
    try:
        CHECKS[check](case)
    except NotApplicable as reason:
        pytest.skip(str(reason))
