"""`kvmesh run`: a mesh for one prompt, gone when the answer is there."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.generate import consume, given
from kvmesh.cli.mesh import (
    DEFAULT_MODEL,
    START_TIMEOUT,
    DecodeOption,
    KvMemoryOption,
    KvstoreOption,
    MeshModelOption,
    PrefillOption,
    TimeoutOption,
    memory_settings,
    start_with_progress,
)
from kvmesh.cli.models import fetch
from kvmesh.cli.plan import MeshPlan, model_argument
from kvmesh.cli.render import notes, timings_line
from kvmesh.cli.talk import RawOption, SeedOption, TemperatureOption, chat_or_text, connect, read_prompt

DEFAULT_PROMPT = "What is the capital of France?"
DRAIN_GRACE = 1.0


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")] = DEFAULT_PROMPT,
    prefill: PrefillOption = 1,
    decode: DecodeOption = 1,
    kvstore: KvstoreOption = 1,
    model: MeshModelOption = DEFAULT_MODEL,
    memory: KvMemoryOption = None,
    raw: RawOption = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    timeout: TimeoutOption = START_TIMEOUT,
) -> None:
    """Start a mesh, stream the answer to PROMPT, print what each hop took, and stop all of it."""
    text = read_prompt(prompt)
    options = given(max_tokens=max_tokens, temperature=temperature, seed=seed)
    mesh = temporary_mesh(model, prefill, decode, kvstore, memory_settings(memory), timeout)
    with mesh as address, connect(address) as client:
        plain, chat = chat_or_text(client, text, None, raw)
        with client.generate(plain, chat=chat, **options) as stream:
            _, _, finish = consume(stream, sys.stdout.write)
        notes().print(timings_line(finish), style="dim", soft_wrap=True)


@contextmanager
def temporary_mesh(
    model: str,
    prefill: int,
    decode: int,
    kvstore: int,
    settings: Mapping[str, str] | None = None,
    timeout: float = START_TIMEOUT,
) -> Iterator[str]:
    """The address of a mesh that ends with the context, or with this process, whichever is first."""
    from kvmesh.cli.launch import Launcher, free_port

    settings = {"KVMESH_DRAIN_GRACE": str(DRAIN_GRACE), **(settings or {})}
    plan = MeshPlan(model_argument(model), prefill, decode, kvstore, free_port(), settings=settings)
    fetch(model)
    with tempfile.TemporaryDirectory(prefix="kvmesh-", ignore_cleanup_errors=True) as logs:
        launcher = Launcher(plan, Path(logs), die_with_parent=True)
        state = start_with_progress(launcher, timeout)
        try:
            yield state.address
        finally:
            launcher.stop(DRAIN_GRACE)
