"""`kvmesh models`: the model folders of this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import filesize
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from kvmesh.cli.plan import FAKE_MODEL
from kvmesh.cli.render import notes, print_whole

app = typer.Typer(no_args_is_help=True, help="Fetch and list models.")


@app.command()
def pull(model: Annotated[str, typer.Argument(help="A name of the catalogue, or of a hub.")]) -> None:
    """Fetch a model, once."""
    typer.echo(f"{model} is in {fetch(model)}")


@app.command("list")
def list_() -> None:
    """List the models known by name, and where those already fetched lie."""
    from kvmesh import hub

    table = Table("model", "download", "on disk", "description", "folder", box=None, pad_edge=False)
    for model in hub.list_models():
        sizes = (filesize.decimal(size) if size else "-" for size in (model.download_bytes, model.size_bytes))
        table.add_row(model.name, *sizes, model.description, str(model.path or "not fetched"))
    print_whole(table)


def fetch(model: str) -> str:
    """Makes sure that the model's folder is here, with a progress bar while it is not; returns its path."""
    if model == FAKE_MODEL:
        return FAKE_MODEL
    from kvmesh import hub

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, console=notes(), transient=True)
    task = progress.add_task("", total=None)

    def advance(description: str, completed: int, total: int | None) -> None:
        progress.start()
        progress.update(task, description=description, completed=completed, total=total)

    try:
        return str(hub.resolve(model, progress=advance).path)
    finally:
        if progress.live.is_started:
            progress.stop()
