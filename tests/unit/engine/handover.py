"""KV computed by one engine, through bitstreams, decoded from by another: what a mesh does, without its services."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvmesh.engine.api import Admitted, EngineRequest, KvArray, KvReady, TokenOutput
from kvmesh.engine.build import build_runner
from kvmesh.engine.core import EngineCore
from kvmesh.hub import ModelFolder
from kvmesh.kv import bitstream
from kvmesh.types import SamplingParams
from tests.unit.engine.oracle import random_tokens

CHUNK, PROMPT, COUNT = 16, 60, 16


def assert_handed_over(folder: ModelFolder, dtype: str) -> None:
    """Decode yields the tokens of an engine that does all by itself; what it imports does matter."""
    prompt = tuple(random_tokens(PROMPT, seed=3).tolist())
    bitstreams, first = _prefill(_engine(folder, dtype), prompt)
    full = bitstreams[: PROMPT // CHUNK]
    alone = _decode(_engine(folder, dtype), prompt, [])
    assert _decode(_engine(folder, dtype), prompt, full) == alone
    assert alone[0] == first
    damaged = [_changed(bits, dtype, lambda data: data[..., ::-1]) for bits in full]
    assert _decode(_engine(folder, dtype), prompt, damaged) != alone


def _engine(folder: ModelFolder, dtype: str) -> EngineCore:
    return EngineCore(build_runner(folder, dtype, blocks=16, device="cpu"))


def _prefill(engine: EngineCore, prompt: tuple[int, ...]) -> tuple[list[bytes], int]:
    """What a prefill worker publishes, bitstreams of CHUNK tokens and a tail, and the first token."""
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    engine.add(EngineRequest("p", prompt, sampling, load_kv=True, prefill_only=True))
    starts = range(0, len(prompt), CHUNK)
    chunks: dict[int, bytes] = {}
    first: list[int] = []
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Admitted):
                engine.start("p", 0, [(start, min(start + CHUNK, len(prompt))) for start in starts])
            elif isinstance(event, KvReady):
                chunks[event.start] = bitstream.encode(event.data, engine.layout.dtype, 0)
            elif isinstance(event, TokenOutput):
                first.append(event.token_id)
    return [chunks[start] for start in starts], first[0]


def _decode(engine: EngineCore, prompt: tuple[int, ...], bitstreams: list[bytes]) -> list[int]:
    sampling = SamplingParams(max_tokens=COUNT, temperature=0.0)
    engine.add(EngineRequest("d", prompt, sampling, load_kv=bool(bitstreams)))
    tokens: list[int] = []
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Admitted) and bitstreams:
                for index, bits in enumerate(bitstreams):
                    engine.import_kv("d", index * CHUNK, bitstream.decode(bits).data)
                engine.start("d", len(bitstreams) * CHUNK)
            elif isinstance(event, TokenOutput):
                tokens.append(event.token_id)
    assert engine.check_integrity() == []
    return tokens


def _changed(bits: bytes, dtype: str, change: Callable[[KvArray], KvArray]) -> bytes:
    return bitstream.encode(np.ascontiguousarray(change(bitstream.decode(bits).data)), dtype, 0)
