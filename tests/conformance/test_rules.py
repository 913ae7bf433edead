"""Every registered rule through every property of the kit; a failure names both."""

from __future__ import annotations

import pytest

from plait.adapter import get_method
from plait.testing import RULE_CHECKS, NotApplicable, RuleCase, rule_names


@pytest.mark.parametrize("check", RULE_CHECKS)
@pytest.mark.parametrize("name", rule_names())
def test_rule(name: str, check: str) -> None:
    try:
        RULE_CHECKS[check](RuleCase(get_method(name)))
    except NotApplicable as reason:
        pytest.skip(str(reason))
