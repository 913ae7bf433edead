"""Chat templates: the usual ones by name, one's own as Jinja, or that of most inputs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from plait.errors import unknown


def _turns(opening: str, closing: str, begin: str) -> str:
    """A template in which each message is `opening` (with the role), its content and `closing`."""
    return (
        "{% for message in messages %}{{ " + opening + " + message['content'] | trim + " + closing
        + " }}{% endfor %}{% if add_generation_prompt %}{{ " + begin + " }}{% endif %}"
    )  # fmt: skip


NAMED = {
    "chatml": _turns(
        r"'<|im_start|>' + message['role'] + '\n'", r"'<|im_end|>\n'", r"'<|im_start|>assistant\n'"
    ),
    "llama3": "{{ bos_token }}"
    + _turns(
        r"'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'",
        "'<|eot_id|>'",
        r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    ),
    "alpaca": _turns(
        r"{'system': '', 'user': '### Instruction:\n', 'assistant': '### Response:\n'}"
        "[message['role']]",
        r"'\n\n'",
        r"'### Response:\n'",
    ),
    "exaone": _turns(
        "'[|' + message['role'] + '|]'",
        r"('\n' if message['role'] == 'user' else '[|endofturn|]\n')",
        "'[|assistant|]'",
    ),
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}",
}


def chat_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The template that was asked for; `auto` takes the commonest of these models' own."""
    if wanted == "auto":
        found = Counter(filter(None, map(template_of, folders)))
        return found.most_common(1)[0][0] if found else None
    if "{" in wanted:
        return wanted
    if wanted not in NAMED:
        raise unknown("chat_template", wanted, [*NAMED, "auto"], where="the recipe")
    return NAMED[wanted]


def template_of(folder: Path) -> str | None:
    """The chat template in a model's folder."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        return found if isinstance(found, str) else None
    return None
