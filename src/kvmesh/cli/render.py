"""How results look in a terminal: timings in one line, tables, JSON. Pure but for the consoles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from kvmesh.cli.store_tables import qualities, reads_of, savings_of
from kvmesh.client import Delta, Finish, PromptInfo, WorkerStatus

MAX_WIDTH = 1000
STATUS_COLUMNS = (
    "role", "worker", "address", "pid", "epoch", "running", "waiting", "blocks", "leases", "chunks", "saved", "quality",
    "reads", "missed", "uptime",
)  # fmt: skip


def notes() -> Console:
    """Where people read along: standard error, so that standard output stays the answer alone."""
    return Console(stderr=True, highlight=False)


def print_whole(table: Table) -> None:
    """As wide as it needs: a narrow terminal wraps lines, which loses less than cutting cells."""
    console = Console(highlight=False)
    needed = table.__rich_measure__(console, console.options.update(max_width=MAX_WIDTH)).maximum
    Console(highlight=False, width=max(console.width, needed)).print(table)


def duration(seconds: float) -> str:
    """Three digits at most: '850 µs', '12.5 ms', '3.20 s', '5 min', '2.0 h'."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else "1.00 s"
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def timings_line(finish: Finish) -> str:
    """One line of what each hop took, and what became of the prompt's KV."""
    t, usage = finish.timings, finish.usage
    hops = {
        "queue": t.queue_seconds,
        "prefill": t.prefill_queue_seconds + t.prefill_seconds,
        "transfer": t.decode_queue_seconds + t.publish_seconds + t.transfer_seconds,
        "first token": t.first_token_seconds,
        "per token": t.per_token_seconds,
    }
    times = " · ".join(f"{name} {duration(seconds)}" for name, seconds in hops.items())
    lossy = any(quality != "raw" for quality in usage.chunks_by_quality)
    moved = f"{usage.transferred_tokens} moved" + (f" as {qualities(usage.chunks_by_quality)}" if lossy else "")
    tokens = f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached, {moved})"
    recovered = f" · {finish.recoveries} recoveries" if finish.recoveries else ""
    return f"{times} · {tokens} → {usage.completion_tokens} tokens{recovered}"


def generation_json(prompt: PromptInfo, outputs: Sequence[Delta], finish: Finish) -> str:
    """Everything known of a generation."""
    choices = {choice.index: asdict(choice) for choice in finish.choices}
    document = {
        **asdict(prompt),
        "outputs": [{**asdict(output), **choices.get(output.index, {})} for output in outputs],
        **{key: value for key, value in asdict(finish).items() if key != "choices"},
    }
    return json.dumps(document, ensure_ascii=False)


def status_table(workers: Sequence[WorkerStatus], check: bool) -> Table:
    table = Table(*STATUS_COLUMNS, *(["integrity"] if check else []), box=None, pad_edge=False)
    for worker in workers:
        table.add_row(*_status_row(worker, check))
    return table


def _status_row(worker: WorkerStatus, check: bool) -> list[str]:
    info, s = worker.info, worker.statistics
    identity = [str(info.role), info.worker_id, info.address, str(info.pid), str(info.epoch)]
    if s is None:
        return [*identity, f"[red]{worker.error or 'no answer'}[/red]"]
    blocks = f"{s.blocks_used}/{s.blocks_cached}/{s.blocks_total}" if s.blocks_total else "-"
    stored = savings_of(s.raw_bytes, s.memory_bytes + s.disk_bytes) if s.raw_bytes else "-"
    load = [str(s.running), str(s.waiting), blocks, str(s.leases), str(s.chunks)]
    missed = f"{s.missed_chunks_total}/{s.missed_replicas_total}"
    load += [stored, qualities(s.chunks_by_quality), reads_of(s.tiers), missed, duration(s.uptime_seconds)]
    verdict = "[red]" + "; ".join(s.integrity_errors) + "[/red]" if s.integrity_errors else "[green]good[/green]"
    return [*identity, *load, *([verdict] if check else [])]


def status_json(workers: Sequence[WorkerStatus]) -> str:
    return json.dumps([_worker_fields(worker) for worker in workers])


def _worker_fields(worker: WorkerStatus) -> dict[str, Any]:
    fields = asdict(worker)
    return {**fields.pop("info"), **fields}
