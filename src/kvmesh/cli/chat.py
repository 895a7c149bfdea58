"""`kvmesh chat`: a conversation. The mesh keeps no session: each turn sends the whole of it, and the KV is reused."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from kvmesh.cli.generate import consume, given
from kvmesh.cli.render import notes, timings_line
from kvmesh.cli.talk import (
    AddressOption,
    MaxTokensOption,
    ModelOption,
    RawOption,
    SeedOption,
    TemperatureOption,
    connect,
    has_template,
    valid_text,
)
from kvmesh.client import Client, Message
from kvmesh.client.requests import Options
from kvmesh.errors import KvmeshError

HELP = "/quit leaves · /clear forgets the conversation · /time shows what the last answer took · Ctrl-C stops an answer"


def chat(
    address: AddressOption = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    raw: RawOption = False,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, /quit or Ctrl-D ends the chat."""
    options = given(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed)
    with connect(address) as client:
        templated = has_template(client, model) and not raw
        _enable_history()
        notes().print(HELP, style="dim")
        Conversation(client, options, templated, system).run()


class Conversation:
    """The turns so far. `templated`: sent as chat messages; else as plain text, line after line."""

    def __init__(self, client: Client, options: Options, templated: bool, system: str | None) -> None:
        self._client = client
        self._options = options
        self._templated = templated
        self._start = [Message(role="system", content=system)] if system else []
        self._messages = list(self._start)
        self._last = ""

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while (line := _ask()) is not None:
            match line.strip():
                case "/quit" | "/exit":
                    return
                case "/clear":
                    self._messages = list(self._start)
                case "/time":
                    notes().print(self._last, style="dim", soft_wrap=True)
                case "/help":
                    notes().print(HELP, style="dim")
                case "":
                    continue
                case _:
                    self._turn(line)

    def _turn(self, line: str) -> None:
        spoken: list[str] = []
        try:
            self._messages.append(Message(role="user", content=valid_text(line)))
            self._answer(spoken)
        except KeyboardInterrupt:
            typer.echo()
        except KvmeshError as error:
            notes().print(f"kvmesh: {error}", style="red", markup=False)
        # What was said before an interruption or a failure was said; an unanswered turn is taken back.
        if spoken:
            self._messages.append(Message(role="assistant", content="".join(spoken)))
        elif self._messages and self._messages[-1]["role"] == "user":
            self._messages.pop()

    def _answer(self, spoken: list[str]) -> None:
        def show(text: str) -> None:
            spoken.append(text)
            sys.stdout.write(text)

        text = None if self._templated else "\n".join(message["content"] for message in self._messages)
        messages = self._messages if self._templated else None
        with self._client.generate(text, chat=messages, **self._options) as stream:
            _, outputs, finish = consume(stream, show)
        spoken[:] = [outputs[0].text] if outputs else []
        self._last = timings_line(finish)


def _ask() -> str | None:
    """The next line; None at the end of the input. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            typer.echo()


def _enable_history() -> None:
    """Line editing and history within the chat, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
