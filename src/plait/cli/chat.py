"""`plait chat`: talk to a base with adapters, and change them while talking."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, Shelf, examples, note, open_base_for, parse_mix

HELP = """/adapter            which adapters are active
/adapter A=1,B=.5   switch (paths or loaded names; `base` for none)
/reset              forget the conversation
/system TEXT        set the system prompt (and reset)
/help, /quit"""


@dataclass
class Talk:
    """A conversation with a model, its adapters and how it generates."""

    model: Any
    tokenizer: Any
    shelf: Shelf
    temperature: float
    max_new_tokens: int
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def switch(self, mix: str) -> str:
        """Activate a mix, or nothing for `base`; returns what is active."""
        import plait

        wanted = {} if mix.strip() in ("base", "") else self.shelf.mix(mix)
        plait.activate(self.model, wanted)
        return self.active()

    def active(self) -> str:
        from plait.adapter.state import find_state

        state = find_state(self.model)
        shown = [f"{name}={weight:g}" for name, weight in (state.active if state else {}).items()]
        return ", ".join(shown) or "base"

    def ask(self, text: str) -> str:
        """Stream the answer to stdout, and keep both turns."""
        self.turns.append({"role": "user", "content": text})
        try:
            answer = self._generate()
        except KeyboardInterrupt:  # the answer, not the program
            self.turns.pop()
            print()
            note("(stopped; that turn is forgotten)")
            return ""
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _prompt(self) -> str:
        first = [{"role": "system", "content": self.system}] if self.system else []
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self.turns[-1]["content"]  # a base without a template continues text
        return self.tokenizer.apply_chat_template(
            [*first, *self.turns], tokenize=False, add_generation_prompt=True
        )

    def _generate(self) -> str:
        import torch
        from transformers import GenerationConfig, TextStreamer

        from plait.evaluation.generate import end_tokens, pad_token

        raw = getattr(self.tokenizer, "chat_template", None) is None
        given = self.tokenizer(self._prompt(), add_special_tokens=raw, return_tensors="pt")
        settings: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            settings["temperature"] = self.temperature
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=end_tokens(self.model, self.tokenizer) or None,
            pad_token_id=pad_token(self.tokenizer),
            **settings,
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = given["input_ids"].to(self.model.device)
        mask = given["attention_mask"].to(self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, generation_config=config, streamer=streamer
            )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def chat(
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Else the adapter's own.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="PATH, or a mix PATH=1.0,PATH=.5; active from the start.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer, end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16.")] = "auto",
) -> None:
    """Talk to a model with adapters; /adapter switches them, /help lists the rest.

    Without a terminal each line of stdin is a turn, and answers go to stdout alone.
    """
    import torch

    torch.manual_seed(seed)
    paths = list(parse_mix(adapter)) if adapter else []
    model, tokenizer = open_base_for(paths, base, dtype)
    talk = Talk(model, tokenizer, Shelf(model), temperature, max_new_tokens, system)
    if adapter:
        talk.switch(adapter)
    if prompt is not None:
        talk.ask(prompt)
        return
    note(f"active: {talk.active()}; /help for commands, Ctrl-D ends")
    while (line := _read()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _command(talk, line):
                return
        else:
            talk.ask(line)


def _read() -> str | None:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _command(talk: Talk, line: str) -> bool:
    """Obey a slash command; False ends the conversation."""
    from plait.errors import PlaitError, unknown

    word, _, rest = line[1:].partition(" ")
    try:
        if word == "quit":
            return False
        if word == "adapter":
            note(f"active: {talk.switch(rest) if rest.strip() else talk.active()}")
        elif word in ("reset", "system"):
            talk.turns.clear()
            talk.system = rest.strip() or None if word == "system" else talk.system
            note("(a new conversation)")
        elif word == "help":
            note(HELP)
        else:
            raise unknown(
                "command", "/" + word, ["/adapter", "/reset", "/system", "/help", "/quit"]
            )
    except PlaitError as error:
        note(f"error: {error}")
    return True


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Talk to a base with adapters.",
        epilog=examples(
            "plait chat --base smollm2-135m",
            "plait chat --base smollm2-135m --adapter out/sql=1.0,out/french=.5",
            'plait chat --adapter out/sql --prompt "Which customers have not paid?"',
        ),
    )(chat)
