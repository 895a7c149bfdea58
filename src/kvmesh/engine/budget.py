"""The token budget of an iteration, from a profile made once: the most tokens whose iteration meets a TBT target.

Sarathi-Serve (arXiv 2403.02310, §4.3): decodes that share an iteration with a prompt chunk wait for it, so the chunk is
as large as the time between tokens allows and no larger, in whole tiles of the matrix products. Knows no requests; to
be called before anything is scheduled, since it writes rubbish into the pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from kvmesh.engine.batch import Batch, Draw, Row, Runner
from kvmesh.types import BLOCK_TOKENS, SamplingParams

TILE = 64
LARGEST = 4096
DECODES = 8
CONTEXT = 512
REPEATS = 3


def profiled_budget(
    runner: Runner, target: float, clock: Callable[[], float] = time.perf_counter, largest: int = LARGEST
) -> int:
    """Tokens, a multiple of TILE: of iterations of DECODES sequences and a prompt chunk, the largest within `target`.

    At least one tile, even if that takes longer: prompts must go on. `target` is in seconds.
    """
    room = min(largest, runner.max_model_len - 1, (runner.blocks - 1) * BLOCK_TOKENS)
    low, high = 1, max(1, room // TILE)
    while low < high:
        middle = (low + high + 1) // 2
        if _seconds(runner, middle * TILE, clock) <= target:
            low = middle
        else:
            high = middle - 1
    return low * TILE


def _seconds(runner: Runner, tokens: int, clock: Callable[[], float]) -> float:
    batch = _batch(runner, tokens)
    times = []
    for _ in range(REPEATS):
        began = clock()
        runner.run(batch)
        times.append(clock() - began)
    return median(times)


def _batch(runner: Runner, tokens: int) -> Batch:
    """Decodes of CONTEXT tokens, and a chunk that begins a prompt.

    Block tables overlap, since nothing is kept, but no two begin with the same block: what is shared is read only once.
    """
    context = min(CONTEXT, runner.max_model_len - 1, runner.blocks * BLOCK_TOKENS - 1)
    draw = (Draw(SamplingParams(max_tokens=1, temperature=0.0), 0, 0, (), ()),)
    table = list(range(-(-max(context + 1, tokens) // BLOCK_TOKENS)))
    turned = [table[i % len(table) :] + table[: i % len(table)] for i in range(DECODES + 1)]
    decodes = [Row([1], context, blocks, draw) for blocks in turned[1:]]
    chunk = Row([1] * max(1, tokens - DECODES), 0, turned[0])
    return Batch((*decodes, chunk))
