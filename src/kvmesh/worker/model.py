"""The model that a worker serves, and the engine that computes it, from the worker's config.

The only place that decides between a fake and a real engine; torch is imported for the latter alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.engine.api import Engine
from kvmesh.engine.fake import FAKE_MODEL, FAKE_VOCABULARY, fake_engine, fake_layout
from kvmesh.kv.keys import fingerprint
from kvmesh.types import WorkerCapacity
from kvmesh.worker.config import WorkerConfig
from kvmesh.worker.job import Model


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
    return _model(FAKE_MODEL, fake_layout(engine.layout), FAKE_VOCABULARY, engine.capacity), engine


def _real(config: WorkerConfig) -> tuple[Model, Engine]:
    from kvmesh.engine.build import build_engine, resolve_dtype  # It imports torch.
    from kvmesh.hub import resolve

    folder = resolve(config.model)
    dtype = resolve_dtype(config.dtype)
    engine = build_engine(
        folder,
        dtype=dtype,
        blocks=config.kv_blocks,
        memory_bytes=config.kv_memory,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        token_budget=config.token_budget,
        threads=config.threads,
    )
    return _model(folder.name, folder.layout(dtype), folder.vocabulary_size, engine.capacity), engine


def _model(name: str, layout: Mapping[str, str], vocabulary_size: int, capacity: WorkerCapacity) -> Model:
    return Model(name, fingerprint(layout), layout, vocabulary_size, capacity)
