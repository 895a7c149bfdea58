"""`kvmesh kv`: what concerns stored KV. Holds no engine: what needs one runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.models import fetch
from kvmesh.cli.plan import FAKE_MODEL, model_argument
from kvmesh.errors import InvalidArgument

app = typer.Typer(no_args_is_help=True, help="Stored KV: its codecs, and the stores that hold it.")


@app.command()
def calibrate(
    text: Annotated[Path, typer.Option(exists=True, file_okay=False, help="A folder of .txt, .md or .rst files.")],
    model: Annotated[str, typer.Option(help="A name of `kvmesh models list`, a folder or a .gguf file.")],
    output: Annotated[Path | None, typer.Option(help="Where to write it. Default: in the model's folder.")] = None,
    contexts: Annotated[int, typer.Option(min=2, help="Passages to run the model on.")] = 25,
    tokens: Annotated[int, typer.Option(min=64, help="Length of a passage.")] = 2048,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Add levels that show what each part is worth.")
    ] = False,
) -> None:
    """Make the profile that cachegen and transform need: how a model's KV is distributed, and what of it matters."""
    if model == FAKE_MODEL:
        raise InvalidArgument("the fake model's KV is noise: there is nothing to learn")
    fetch(model)
    command = [sys.executable, "-m", "kvmesh.worker.calibration", model_argument(model), str(text)]
    command += ["--contexts", str(contexts), "--tokens", str(tokens)]
    command += ["--output", str(output)] if output else []
    command += ["--ablations"] if ablations else []
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)
