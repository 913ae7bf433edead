"""The generated pages are what the code says today, and the README's links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def generated() -> dict[Path, str]:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_table_of_methods_is_up_to_date():
    page = ROOT / "docs" / "methods.md"
    assert page.read_text() == generated()[page], "run `make docs`"


def test_every_command_has_a_page():
    """(The text of a help page also depends on the version of typer.)"""
    assert all(file.is_file() for file in generated()), "run `make docs`"


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(page: str):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_recipes_of_the_rules_page_are_recipes_whose_rules_stand_together():
    import yaml

    from plait.adapter.together import conflicts
    from plait.training.dryrun import make_rules
    from plait.training.recipe import Recipe

    text = (ROOT / "docs" / "rules.md").read_text()
    found = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert len(found) == 2
    for values in found:
        rules = make_rules(Recipe.make(values))
        assert len(rules) == 2 and not conflicts(rules)
    refused = Recipe.make({**found[1], "rules": ["lora-squeeze", "ema"]})
    assert conflicts(make_rules(refused))
