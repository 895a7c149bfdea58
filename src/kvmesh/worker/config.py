"""What an engine process can be told, by environment variables of prefix KVMESH_, beside what every process can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kvmesh.kv.codecs.choice import check_setting
from kvmesh.power.rapl import POWERCAP
from kvmesh.process import ProcessConfig


class WorkerConfig(ProcessConfig):
    """Of prefill and decode alike; seconds and bytes where nothing else is said."""

    model: str = Field("smollm2-135m-instruct", min_length=1)
    """A name, a folder, a GGUF file, or "fake"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and KV; auto is float32 if `precision` is, bfloat16 otherwise."""
    precision: Literal["auto", "float32", "bf16", "int8", "int4"] | None = None
    """Of the weights: `kvmesh.engine.linear`; int8 and int4 on CPUs alone. By default that of `dtype`, so bf16."""
    codec: Annotated[str, AfterValidator(check_setting)] = "auto"
    """Of the chunks in the store: raw, int8, fp8, cachegen or cachegen:LEVEL; adaptive is raw or lossy as suits the
    links, auto is adaptive where the model has a profile, else raw. All workers of a mesh need the same."""
    codec_profile: Path | None = None
    """By default the one in the model's folder, or the one that ships."""
    quality: int = Field(2, ge=1)
    """The coarsest version of a chunk to fetch over a slow link, in quality layers."""
    kv_memory: int | None = Field(None, gt=0)
    """Bytes of the block pool; `kv_blocks` goes before it."""
    kv_blocks: int | None = Field(None, gt=0)
    swap_memory: int | None = Field(None, ge=0)
    """Bytes for the KV of preempted sequences; a quarter of the pool's by default, 0: they are always recomputed."""
    max_running: int = Field(64, gt=0)
    max_waiting: int = Field(256, ge=0)
    token_budget: int = Field(512, gt=0)
    tbt_target: float | None = Field(None, gt=0)
    """Seconds between tokens that prompts may cost those who decode: sets `token_budget` by a profile at the start."""
    threads: int = Field(1, gt=0)
    power_meter: Literal["auto", "none", "nvml", "rapl"] = "auto"
    """auto: accelerators, else processors, else none."""
    power_accelerators: tuple[int, ...] | None = None
    """NVML's numbers of those that this worker uses, as in [0, 1]; default: all of the machine."""
    power_clocks: Literal["none", "nvml"] = "none"
    """nvml: a router near its power budget may cap the clocks of these accelerators."""
    powercap_path: Path = POWERCAP
    """Where the processors' counters are; in a container perhaps elsewhere."""
    fake_step_seconds: float = Field(0.0, ge=0)
