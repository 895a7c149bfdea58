"""How much KV memory is wasted, by way of allocating it, on a real trace; and what preempted sequences cost.

    python bench/paged.py --lengths FILE.csv [--requests 2000] [--blocks 4096] [--json FILE]

FILE: input and output tokens of requests, as the Azure LLM inference trace 2023 has them (columns ContextTokens and
GeneratedTokens), or num_prefill_tokens and num_decode_tokens. All requests wait at the start: the pool is always full.
The engine's own scheduler and block pool run; only the model is missing. Waste is the share of reserved slots that hold
no token, averaged over iterations: of paged blocks as measured; of one contiguous reservation a sequence, of the
longest context or of its own final length, over the same running sequences (vLLM, arXiv 2309.06180, section 1: under
4 % against 60 to 80 %).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.engine.api import EngineRequest, KvArray, KvLayout, TokenOutput
from kvmesh.engine.batch import Batch, SampledToken
from kvmesh.engine.core import EngineCore
from kvmesh.types import BLOCK_TOKENS, SamplingParams

COLUMNS = (("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"))
LONGEST = 8192


@dataclass(frozen=True, slots=True)
class Result:
    """Shares of reserved slots without a token, means over `iterations`; `running`: sequences at once, mean."""

    iterations: int
    running: float
    paged: float
    final_length: float
    longest_context: float
    preemptions: int


class NoModel:
    """A runner that computes nothing: only memory is of interest."""

    layout = KvLayout(1, 1, 2, "float16")
    max_model_len = LONGEST
    vocabulary_size = 4

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def run(self, batch: Batch) -> list[list[SampledToken]]:
        return [[SampledToken(3) for _ in row.draws] for row in batch.rows]

    def read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        return np.zeros(self.layout.chunk_shape(tokens), np.float16)

    def begin_read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> Callable[[], KvArray]:
        return lambda: self.read_kv(block_ids, start, tokens)

    def write_kv(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        pass


def read_lengths(path: Path, count: int) -> list[tuple[int, int]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = next((pair for pair in COLUMNS if rows and set(pair) <= rows[0].keys()), None)
    if columns is None:
        raise SystemExit(f"{path} has none of the columns {COLUMNS}")
    lengths = ((int(float(row[columns[0]])), int(float(row[columns[1]]))) for row in rows)
    return [(given, made) for given, made in lengths if given > 0 < made and given + made < LONGEST][:count]


def measure(lengths: Sequence[tuple[int, int]], blocks: int) -> Result:
    engine = EngineCore(NoModel(blocks), max_running=512, max_waiting=len(lengths), token_budget=2048)
    for number, (given, made) in enumerate(lengths):
        prompt = (number % 3, *[2] * (given - 1))
        params = SamplingParams(max_tokens=made, ignore_eos=True)
        engine.add(EngineRequest(str(number), prompt, params, root=number.to_bytes(4, "little")))
    rows: list[tuple[int, float, float, float]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=len(lengths))
        while engine.has_work():
            events = engine.step()
            progress.advance(task, sum(isinstance(event, TokenOutput) and event.last for event in events))
            if running := engine.scheduler.running:
                held = sum(len(sequence.blocks) for sequence in running) * BLOCK_TOKENS
                tokens = sum(sequence.computed for sequence in running)
                final = sum(
                    len(sequence.group.request.prompt) + sequence.group.request.sampling.max_tokens
                    for sequence in running
                )
                rows.append(
                    (len(running), 1 - tokens / held, 1 - tokens / final, 1 - tokens / (LONGEST * len(running)))
                )
    running, paged, final_length, longest = np.mean(rows, axis=0).tolist()
    return Result(len(rows), running, paged, final_length, longest, engine.scheduler.preemptions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=4096, help=f"of {BLOCK_TOKENS} tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(read_lengths(arguments.lengths, arguments.requests), arguments.blocks)
    table = Table(title=f"KV memory without a token, {result.iterations:,} iterations, {result.running:.1f} sequences")
    for column in ("reserved as", "waste"):
        table.add_column(column)
    table.add_row(f"blocks of {BLOCK_TOKENS} (kvmesh)", f"{result.paged:.2%}")
    table.add_row("one run of the final length", f"{result.final_length:.2%}")
    table.add_row(f"one run of {LONGEST:,} tokens", f"{result.longest_context:.2%}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
