"""How commands find and reach a mesh, and the options that they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from kvmesh.cli.plan import DEFAULT_PORT, HOST
from kvmesh.cli.processes import alive
from kvmesh.cli.state import StateFile
from kvmesh.client import Client, Message
from kvmesh.errors import InvalidArgument, Unavailable

ADDRESS_VARIABLE = "KVMESH_ADDRESS"
UNREACHABLE = ("failed to connect", "connection refused", "dns resolution failed", "name resolution")

AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help=f"The router. Default: the mesh that `kvmesh up` started here, else ${ADDRESS_VARIABLE}, "
        f"else {HOST}:{DEFAULT_PORT}.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the model's chat template.")]
ModelOption = Annotated[str | None, typer.Option(help="A model of the mesh. Default: its only one.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Most tokens to generate. Default: what the context holds.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy. Default: 1.")]
SeedOption = Annotated[int | None, typer.Option(help="Same seed, same tokens. Default: chosen by the router.")]


def default_address() -> str:
    """The running mesh of this machine, else the environment's, else the usual one."""
    state = StateFile().load()
    if state and state.address and any(map(alive, state.processes)):
        return state.address
    return os.environ.get(ADDRESS_VARIABLE) or f"{HOST}:{DEFAULT_PORT}"


@contextmanager
def connect(address: str | None) -> Iterator[Client]:
    """A client of the router; one that cannot be reached is named.

    Raises:
        Unavailable: nothing answers there, with the address and what to do.
    """
    target = address or default_address()
    with Client(target) as client:
        try:
            yield client
        except Unavailable as error:
            if any(words in str(error).lower() for words in UNREACHABLE):
                raise Unavailable(f"no router answers at {target}; `kvmesh up` starts a mesh") from error
            raise


def chat_or_text(client: Client, prompt: str, model: str | None, raw: bool) -> tuple[str | None, list[Message] | None]:
    """The prompt as (text, chat): a chat of one turn if the model has a template, unless `raw`."""
    if raw or not has_template(client, model):
        return prompt, None
    return None, [Message(role="user", content=prompt)]


def has_template(client: Client, model: str | None) -> bool:
    models = client.models(model)
    return bool(models) and models[0].has_chat_template


def read_prompt(prompt: str) -> str:
    """The argument itself, or standard input for "-"; checked as valid_text does."""
    return valid_text(sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt)


def valid_text(text: str) -> str:
    """The text, if it can be sent.

    Raises:
        InvalidArgument: it is not UTF-8 (the terminal's stray bytes arrive as surrogates).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument("the prompt is not valid UTF-8") from error
    return text
