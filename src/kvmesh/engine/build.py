"""Builds an engine from a model folder: chooses dtype, device and the size of the KV pool. Reads no environment."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.choice import choose
from kvmesh.engine.grammar import Grammars
from kvmesh.engine.linear import resolve_precision
from kvmesh.engine.loading import load
from kvmesh.engine.models.config import parse
from kvmesh.engine.runner import TorchRunner
from kvmesh.errors import InvalidArgument
from kvmesh.hub import ModelFolder
from kvmesh.types import BLOCK_TOKENS

if TYPE_CHECKING:
    from kvmesh.engine.core import EngineCore

DEFAULT_KV_MEMORY = 1 << 30
log = logging.getLogger(__name__)


def build_engine(
    folder: ModelFolder,
    *,
    dtype: str = "auto",
    blocks: int | None = None,
    memory_bytes: int | None = None,
    max_running: int = 64,
    max_waiting: int = 256,
    token_budget: int = 512,
    threads: int = 1,
    max_model_len: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    swap_bytes: int | None = None,
) -> EngineCore:
    """Loads the model and gives it `blocks` blocks of KV, or as many as `memory_bytes` holds (1 GiB by default).

    `swap_bytes`: host memory for the KV of preempted sequences; a quarter of the pool's by default.

    `precision` is that of the weights: `engine.linear.precision` lists them. By default that of the dtype.

    `threads` is torch's number of threads for the whole process: one per process is best on shared cores.

    Raises:
        InvalidArgument: unsupported model or dtype, or a pool too small for one sequence of `max_model_len`.
        NotFound: weight files are missing.
    """
    from kvmesh.engine.core import EngineCore

    torch.set_num_threads(threads)
    runner = build_runner(folder, dtype, blocks, memory_bytes, max_model_len, device, precision)
    pool_bytes = runner.blocks * BLOCK_TOKENS * runner.layout.bytes_per_token
    return EngineCore(
        runner,
        max_running=max_running,
        max_waiting=max_waiting,
        token_budget=token_budget,
        swap_bytes=pool_bytes // 4 if swap_bytes is None else swap_bytes,
    )


def build_runner(
    folder: ModelFolder,
    dtype: str = "auto",
    blocks: int | None = None,
    memory_bytes: int | None = None,
    max_model_len: int | None = None,
    device: str = "auto",
    precision: str | None = None,
) -> TorchRunner:
    """The runner of `build_engine`, for those who schedule themselves."""
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, precision)
    precision = resolve_precision(precision, dtype, device)
    log.info("weights in %s, KV in %s, on %s", dtype if precision == "float32" else precision, dtype, device)
    model = load(folder, dtype, device, precision=precision)
    if blocks is None:
        blocks = blocks_within(kv_layout_of(folder, dtype), memory_bytes, free_memory(device))
    layout, threads = kv_layout_of(folder, dtype), torch.get_num_threads()
    back_end = choose(layout, device, threads, heads=model.config.heads, windows=model.windows)
    return TorchRunner(model, blocks, max_model_len, back_end, _grammars(folder))


def _grammars(folder: ModelFolder) -> Grammars | None:
    """None without a tokenizer that fits the model, and without a token to end a text with."""
    if not folder.tokenizer_path.is_file() or not folder.eos_token_ids:
        return None
    try:
        return Grammars(folder.tokenizer_path, folder.vocabulary_size, folder.eos_token_ids, torch.get_num_threads())
    except ValueError as error:
        log.warning("no structured output with %s: %s", folder.name, error)
        return None


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is a device, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, precision: str | None = None) -> str:
    """`auto` is float32 with float32 weights, and bfloat16 otherwise, on any device: unlike ones can share KV."""
    if dtype != "auto":
        return dtype
    return "float32" if precision == "float32" else "bfloat16"


def kv_layout_of(folder: ModelFolder, dtype: str) -> KvLayout:
    """The shape of a model's KV in a resolved dtype, without loading it."""
    config = parse(folder.config)
    return KvLayout(config.layers, config.kv_heads, config.head_dim, dtype, config.kv_planes)


def blocks_within(layout: KvLayout, memory_bytes: int | None, free: int) -> int:
    """Blocks of KV that `memory_bytes` hold; by default 1 GiB, or half of what is free if that is less.

    Raises:
        InvalidArgument: not even one block.
    """
    block_bytes = layout.bytes_per_token * BLOCK_TOKENS
    budget = min(DEFAULT_KV_MEMORY, free // 2) if memory_bytes is None else memory_bytes
    if budget < block_bytes:
        raise InvalidArgument(f"{budget} bytes of KV memory do not hold one block of {block_bytes} bytes")
    return budget // block_bytes


def free_memory(device: str = "cpu") -> int:
    """Bytes that this process may still take: of the device, of the machine, of its control group."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    machine = _available()
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(machine, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return machine


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
