"""The conformance kit: what every adapter method must do, as checks that anybody can run.

    import plait.testing
    plait.testing.check_method("lora")        # or your own Method; it need not be registered
    plait.testing.check_rule("lora-pro")

Each check is a function of a `Case` (a method on one tiny model in one dtype) that raises
AssertionError, or `NotApplicable` where the method has no such property. `cases(method)` lists what
concerns a method, for pytest's parametrize.
"""

from plait.testing.case import Case, NotApplicable, perturb, rebuilt
from plait.testing.kit import CHECKS, attachable, cases, check_method, kinds_of
from plait.testing.models import SUBJECTS, make_model, tiny_llama
from plait.testing.rules import RULE_CHECKS, RuleCase, check_rule, rule_names

__all__ = [
    "CHECKS",
    "RULE_CHECKS",
    "SUBJECTS",
    "Case",
    "NotApplicable",
    "RuleCase",
    "attachable",
    "cases",
    "check_method",
    "check_rule",
    "kinds_of",
    "make_model",
    "perturb",
    "rebuilt",
    "rule_names",
    "tiny_llama",
]
