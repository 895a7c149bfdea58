"""The entry point: gathers the commands, and turns every failure into one sentence and an exit status.

0 success · 1 the mesh said no · 2 bad usage · 70 a bug · 130 interrupted
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from kvmesh import __version__
from kvmesh.cli import (
    bench,
    chat,
    generate,
    kv,
    mesh,
    models,
    operate,
    planner,
    profile,
    replan,
    run,
    simulate,
    status,
    store,
)
from kvmesh.errors import KvmeshError

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
DEBUG_VARIABLE = "KVMESH_DEBUG"

app = typer.Typer(name="kvmesh", add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.command()(mesh.up)
app.command()(mesh.down)
app.command()(run.run)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(status.status)
app.command()(planner.plan)
app.command()(replan.replan)
app.command()(simulate.simulate)
app.command()(operate.operate)
app.command()(profile.profile)
for command in (store.stat, store.ls, store.verify, store.evict):
    kv.app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(kv.app, name="kv")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvmesh {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve language models with separate router, prefill, decode and kvstore services."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> NoReturn:
    """The console script `kvmesh`."""
    received: list[int] = []

    def terminate(number: int, frame: object) -> NoReturn:
        """A polite kill cleans up as Ctrl-C does."""
        received.append(number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    sys.exit(execute(sys.argv[1:], received))


def execute(arguments: list[str], received: Sequence[int] = ()) -> int:
    """Runs one command line; returns its exit status and prints what went wrong, if anything did.

    `received`: the signals to end that came. Libraries may turn the exit of a handler into an error of their own.
    """
    try:
        code = int(app(arguments, prog_name="kvmesh", standalone_mode=False) or 0)
        return _fail("interrupted", code) if code == INTERRUPTED else code
    except KvmeshError as error:
        return _fail(str(error), 1)
    except typer.TyperException as error:
        return _fail(_usage(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not try to flush to them again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        return _fail(f"this command needs the package {error.name!r}: pip install 'kvmesh[all]'", 1)
    except OSError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if received:
            return 128 + received[0]
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _fail(f"bug: {type(error).__name__}: {error} ({DEBUG_VARIABLE}=1 shows the traceback)", BUG)


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return f"{error.format_message().rstrip('.')}{hint}"


def _fail(sentence: str, code: int) -> int:
    print(f"kvmesh: {sentence}", file=sys.stderr)
    return code
