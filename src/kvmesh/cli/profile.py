"""`kvmesh profile`: measures a live worker, and writes what `kvmesh plan` and `kvmesh simulate` can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvmesh.cli.render import duration, notes
from kvmesh.errors import InvalidArgument
from kvmesh.loop import run

if TYPE_CHECKING:
    from kvmesh.bench.profiling import Grid
    from kvmesh.planner.latency.measured import Profile

PROMPT_POINTS, CONTEXT_POINTS = 12, 4
SHORTEST = 16
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def profile(
    address: Annotated[str, typer.Option(help="host:port of a prefill or decode worker; see `kvmesh status`.")],
    output: Annotated[Path, typer.Option(help="Where to write the profile (.json).")],
    max_prompt_tokens: Annotated[int, typer.Option(min=64, help="The longest prompt and context.")] = 2048,
    max_batch: Annotated[int, typer.Option(min=1, help="The most sequences that decode at once.")] = 16,
    token_budget: Annotated[int, typer.Option(min=1, help="The worker's own: KVMESH_TOKEN_BUDGET.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each length, of which the median counts.")] = 3,
    steps: Annotated[int, typer.Option(min=8, help="Decode steps of each point.")] = 32,
) -> None:
    """Measure how long an idle worker takes for prompts and decode steps, and fit a model to it."""
    from kvmesh.bench.profiling import Grid, geometric

    if output.suffix != ".json":
        raise InvalidArgument(f"--output: {output} must end in .json")
    grid = Grid(
        geometric(SHORTEST, max_prompt_tokens, PROMPT_POINTS),
        [batch for batch in BATCHES if batch <= max_batch],
        geometric(max(SHORTEST, max_prompt_tokens // 32), max_prompt_tokens // 2, CONTEXT_POINTS),
        repeats,
        steps,
    )
    found = run(_measure(address, grid, token_budget))
    found.write(output)
    Console(highlight=False).print(*_lines(found), f"written to {output}", sep="\n", soft_wrap=True)


async def _measure(address: str, grid: Grid, token_budget: int) -> Profile:
    from kvmesh.bench.profiling import Profiler
    from kvmesh.rpc.channel import ChannelPool

    with _progress() as bar:
        async with ChannelPool() as channels:
            profiler = Profiler(channels, address, lambda what: bar(0, what))
            info = await profiler.connect()
            capacity = info.capacity
            steps = grid.decode_points(capacity.blocks * capacity.block_tokens, capacity.max_running)
            bar(len(grid.lengths) + (len(steps) if info.role.decodes else 0), f"measuring {info.worker_id}")
            return await profiler.run(grid, token_budget)


@contextmanager
def _progress() -> Iterator[Callable[[int, str], None]]:
    """A bar whose total is set by the first call; every further one is a step."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = notes()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("connecting", total=None)

        def advance(total: int, what: str) -> None:
            progress.update(task, description=what, **({"total": total} if total else {"advance": 1}))  # type: ignore[arg-type]

        yield advance


def _lines(found: Profile) -> Iterator[str]:
    prompt, step = found.prefill_fit(), found.decode_fit()
    a, b, c = prompt.coefficients
    yield f"prompt  {duration(a)} an iteration + {duration(b)} a token + {c:.3g} s a token squared"
    yield f"        {prompt.mape:.1%} mean error on {prompt.held_out} of {prompt.points} points, held out"
    if step:
        a, b, c = step.coefficients
        yield f"step    {duration(a)} + {b:.3g} s a token of context + {duration(c)} a sequence"
        yield f"        {step.mape:.1%} mean error on {step.held_out} of {step.points} points, held out"
