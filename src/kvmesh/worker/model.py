"""The model that a worker serves, and the engine that computes it, from the worker's config.

The only place that decides between a fake and a real engine; torch is imported for the latter alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from kvmesh.engine.api import Engine, KvArray, KvLayout
from kvmesh.engine.batch import Runner
from kvmesh.engine.budget import profiled_budget
from kvmesh.engine.fake import FAKE_MODEL, FAKE_VOCABULARY, fake_engine, fake_layout
from kvmesh.engine.warmup import time_prompt, warm_up
from kvmesh.kv import bitstream
from kvmesh.kv.codec import EXACT, Codec
from kvmesh.kv.codecs.adaptive import Adaptive
from kvmesh.kv.codecs.choice import find_profile, open_codec
from kvmesh.kv.keys import fingerprint
from kvmesh.rpc.address import is_loopback
from kvmesh.types import WorkerCapacity
from kvmesh.worker.config import WorkerConfig
from kvmesh.worker.job import Coding, Model, Speed

log = logging.getLogger(__name__)


def load_model(config: WorkerConfig) -> tuple[Model, Engine]:
    """Blocks: for the real model, until it is fetched and loaded."""
    return _fake(config) if config.model == FAKE_MODEL else _real(config)


def _fake(config: WorkerConfig) -> tuple[Model, Engine]:
    engine = fake_engine(
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        token_budget=config.token_budget,
        blocks=config.kv_blocks or 1024,
        step_seconds=config.fake_step_seconds,
    )
    codec = open_codec(config.codec, _shape(engine.layout))
    model = _model(FAKE_MODEL, fake_layout(engine.layout), FAKE_VOCABULARY, engine.capacity, codec)
    return replace(model, structured_output=False), engine


def _real(config: WorkerConfig) -> tuple[Model, Engine]:
    from kvmesh.engine.build import build_engine, kv_layout_of, resolve_device, resolve_dtype  # It imports torch.
    from kvmesh.engine.linear import resolve_precision
    from kvmesh.hub import resolve

    folder = resolve(config.model)
    device = resolve_device("auto")
    dtype = resolve_dtype(config.dtype, config.precision)
    precision = resolve_precision(config.precision, dtype, device)
    profile = find_profile(config.codec_profile, folder.path, folder.name)
    # On loopback nothing is remote, so nothing becomes lossy: no need to wait for what only that needs.
    warm = config.codec != "auto" or not is_loopback(config.advertise or config.host)
    codec = open_codec(config.codec, _shape(kv_layout_of(folder, dtype)), profile, warm=warm, device=device)
    engine = build_engine(
        folder,
        dtype=dtype,
        precision=precision,
        device=device,
        blocks=config.kv_blocks,
        memory_bytes=config.kv_memory,
        swap_bytes=config.swap_memory,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        token_budget=config.token_budget,
        threads=config.threads,
    )
    kv = warm_up(engine.runner)
    if kv is not None and warm:
        bitstream.decode(bitstream.encode(kv, dtype, engine.capacity.first_layer, codec), codec)
    speed = None
    if warm and isinstance(codec, Adaptive):
        speed = _measure(engine.runner, dtype, codec, config.quality)
    if config.tbt_target:
        engine.scheduler.token_budget = profiled_budget(engine.runner, config.tbt_target)
        log.info("token budget for %g s between tokens: %d", config.tbt_target, engine.scheduler.token_budget)
    layout = folder.layout(dtype, precision)
    model = _model(folder.name, layout, folder.vocabulary_size, engine.capacity, codec)
    return replace(model, speed=speed), engine


def _measure(runner: Runner, dtype: str, codec: Adaptive, quality: int) -> Speed | None:
    """Of a short prompt, once all is warm; None if there is no room for one."""
    timed = time_prompt(runner)
    if timed is None:
        return None
    kv, seconds = timed
    return Speed(kv.shape[2], seconds, tuple(_coding(kv, dtype, each, quality) for each in codec.members))


def _coding(kv: KvArray, dtype: str, codec: Codec, quality: int) -> Coding:
    """The second of two turns, in seconds of the thread's own: the first one also loads what the codec needs."""
    for _ in range(2):
        began = time.thread_time()
        bits = bitstream.encode(kv, dtype, 0, codec)
        encoding, coarsest = time.thread_time() - began, bytes(bitstream.cut(bits, quality))
        began = time.thread_time()
        bitstream.decode(coarsest, codec)
        decoding = time.thread_time() - began
    return Coding(bits, encoding, decoding)


def _shape(layout: KvLayout) -> tuple[int, int, int, int]:
    return (layout.layers, layout.planes, layout.kv_heads, layout.head_dim)


def _model(name: str, layout: Mapping[str, str], vocabulary_size: int, capacity: WorkerCapacity, codec: Codec) -> Model:
    """Lossy KV never shares a namespace with exact KV, nor with KV of another loss."""
    if codec.namespace != EXACT:
        layout = {**layout, "codec": codec.namespace}
    return Model(name, fingerprint(layout), layout, vocabulary_size, capacity, codec)
