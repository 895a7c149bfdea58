"""What an engine process can be told, by environment variables of prefix KVMESH_, beside what every process can."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvmesh.process import ProcessConfig


class WorkerConfig(ProcessConfig):
    """Of prefill and decode alike; seconds and bytes where nothing else is said."""

    model: str = Field("smollm2-135m-instruct", min_length=1)
    """A name, a folder, a GGUF file, or "fake"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_memory: int | None = Field(None, gt=0)
    """Bytes of the block pool; `kv_blocks` goes before it."""
    kv_blocks: int | None = Field(None, gt=0)
    max_running: int = Field(64, gt=0)
    max_waiting: int = Field(256, ge=0)
    token_budget: int = Field(512, gt=0)
    threads: int = Field(1, gt=0)
    fake_step_seconds: float = Field(0.0, ge=0)
