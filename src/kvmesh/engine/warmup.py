"""Computes once what requests will ask for, so that none of them waits for what happens only once.

Weights are touched for the first time, kernels and allocators set up; without this the first prompt takes ten times as
long as the second. Torch-free: any runner will do.
"""

from __future__ import annotations

import time

from kvmesh.engine.api import KvArray
from kvmesh.engine.batch import Batch, Draw, Row, Runner
from kvmesh.types import BLOCK_TOKENS, SamplingParams

PROMPT_TOKENS = 2 * BLOCK_TOKENS
TIMED_TOKENS = 8 * BLOCK_TOKENS


def warm_up(runner: Runner) -> KvArray | None:
    """A prompt, a decode step, and its KV read and written; to be called before anything is scheduled.

    Leaves rubbish in the first three blocks, which nobody has. Returns the KV of the prompt; None if the pool or the
    context is too small for the exercise.
    """
    if runner.blocks < 3 or runner.max_model_len <= PROMPT_TOKENS:
        return None
    blocks, prompt = [0, 1, 2], [token % runner.vocabulary_size for token in range(PROMPT_TOKENS)]
    draws = tuple(_draw(temperature) for temperature in (0.0, 1.0))
    runner.run(Batch((Row(prompt, 0, blocks, draws),)))
    runner.run(Batch((Row(prompt[:1], PROMPT_TOKENS, blocks, draws[:1]),)))
    kv = runner.read_kv(blocks, 0, PROMPT_TOKENS)
    runner.write_kv(blocks, 0, kv)
    return kv


def time_prompt(runner: Runner) -> tuple[KvArray, float] | None:
    """KV of a short prompt and the seconds that computing it takes, once warm; None if there is no room for it.

    Leaves rubbish in the first blocks, like `warm_up`.
    """
    blocks = list(range(TIMED_TOKENS // BLOCK_TOKENS))
    if runner.blocks < len(blocks) or runner.max_model_len <= TIMED_TOKENS:
        return None
    prompt = [token % runner.vocabulary_size for token in range(TIMED_TOKENS)]
    began = time.perf_counter()
    runner.run(Batch((Row(prompt, 0, blocks, (_draw(0.0),)),)))
    seconds = time.perf_counter() - began
    return runner.read_kv(blocks, 0, TIMED_TOKENS), seconds


def _draw(temperature: float) -> Draw:
    return Draw(SamplingParams(max_tokens=1, temperature=temperature), 0, 0, (), ())
