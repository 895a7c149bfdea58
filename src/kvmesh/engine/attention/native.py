"""Attention by a native kernel: one call per layer writes new KV and attends, for any mix of decode and prefill rows.

The kernel reads KV in place in a layout of its own (see kernel/pool.hpp), so it comes with its own pool. Knows no
weights and compiles nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import check_layout, from_wire, to_wire
from kvmesh.engine.attention.prefixes import CHUNK_BLOCKS, Cost, shared_prefixes
from kvmesh.types import BLOCK_TOKENS

MAX_HEAD_DIM = 256
KEYS_AT_ONCE = 256
"""The kernel sums over keys in chunks of so many: who shares whole ones gets what he would get alone, bit by bit."""
SHARING = Cost(multiple=KEYS_AT_ONCE // BLOCK_TOKENS, chunk_blocks=CHUNK_BLOCKS)
_LANES = 16
_INT32 = np.dtype(np.int32)


class _Pool(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("first_block", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("first_member", ctypes.c_void_p),
        ("members", ctypes.c_void_p),
        ("segments", ctypes.c_int32),
        ("prefixes", ctypes.c_int32),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


class Kernel:
    """The library's functions with their types."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.create = library.kvmesh_create
        self.create.argtypes, self.create.restype = (pointer, integer), pointer
        self.destroy = library.kvmesh_destroy
        self.destroy.argtypes, self.destroy.restype = (pointer,), None
        self.run = library.kvmesh_run
        self.run.argtypes, self.run.restype = (pointer, pointer, pointer, long, pointer), None
        self.put = library.kvmesh_put
        self.put.argtypes, self.put.restype = (pointer, pointer, long, pointer), None
        self.get = library.kvmesh_get
        self.get.argtypes, self.get.restype = (pointer, pointer, long, pointer, pointer), None
        library.kvmesh_isa.restype = ctypes.c_char_p
        self.isa: str = library.kvmesh_isa().decode()


def supports(layout: KvLayout) -> bool:
    """Whether the kernel has this dtype and head size, and K apart from V."""
    sized = layout.head_dim % 2 == 0 and layout.head_dim <= MAX_HEAD_DIM
    return sized and layout.planes == 2 and layout.dtype in ("float32", "bfloat16")


class Tables:
    """Where the tokens of a batch lie in a pool of `blocks`, as the kernel reads it: arrays that only ever grow.

    `sharing`: where that pays, a prefix that decoding sequences have in common is read once for all of them.
    """

    def __init__(self, blocks: int, sharing: Cost | None = None) -> None:
        self._limit = blocks
        self.sharing = sharing
        self.struct = _Batch()
        self.address = ctypes.addressof(self.struct)
        self._segments: NDArray[np.int32] = np.empty((4, 0), _INT32)
        self._blocks: NDArray[np.int32] = np.empty(0, _INT32)
        self._prefixes: tuple[NDArray[np.int32], ...] = ()

    def fill(self, segments: Sequence[Segment]) -> None:
        """Takes the batch.

        Raises:
            IndexError: it names memory that is not the pool's. The kernel itself checks nothing.
        """
        count = len(segments)
        tables = [segment.block_ids for segment in segments]
        lengths = [len(table) for table in tables]
        self._reserve(count, sum(lengths))
        starts, tokens, first_block, own = self._segments
        starts[:count] = [segment.start for segment in segments]
        tokens[:count] = [segment.tokens for segment in segments]
        first_block[0] = 0
        np.cumsum(lengths[:-1], out=first_block[1:count])
        self._blocks[: sum(lengths)] = list(chain.from_iterable(tables))
        own[:count] = 0
        self.struct.segments, self.struct.prefixes = count, 0
        self._check(starts[:count] + tokens[:count], np.multiply(lengths, BLOCK_TOKENS), self._blocks[: sum(lengths)])

        if self.sharing and count > 1:
            self._share_prefixes(starts[:count], tokens[:count], first_block[:count], own, self.sharing)

    def _share_prefixes(
        self,
        starts: NDArray[np.int32],
        tokens: NDArray[np.int32],
        first_block: NDArray[np.int32],
        own: NDArray[np.int32],
        cost: Cost,
    ) -> None:
        full = np.where(tokens == 1, starts // BLOCK_TOKENS, 0)
        prefixes = shared_prefixes(self._blocks, first_block, full, cost)
        for prefix in prefixes:
            own[prefix.members] = prefix.end * BLOCK_TOKENS
        firsts, ends = (
            BLOCK_TOKENS * np.array(x, _INT32) for x in ([p.first for p in prefixes], [p.end for p in prefixes])
        )
        first_member = np.cumsum([0, *(len(prefix.members) for prefix in prefixes)], dtype=_INT32)
        members = np.concatenate([np.empty(0, _INT32), *(prefix.members.astype(_INT32) for prefix in prefixes)])
        self._prefixes = (firsts, ends, first_member, members)
        addresses = [array.ctypes.data for array in self._prefixes]
        self.struct.first, self.struct.end, self.struct.first_member, self.struct.members = addresses
        self.struct.prefixes = len(prefixes)

    def _check(self, ends: NDArray[np.int32], limits: NDArray[np.int64], block_ids: NDArray[np.int32]) -> None:
        if (ends > limits).any() or (block_ids.view(np.uint32) >= self._limit).any():
            raise IndexError("a segment lies outside its block table, or a block outside the pool")

    def _reserve(self, segments: int, blocks: int) -> None:
        if self._segments.shape[1] < segments:
            self._segments = np.empty((4, 2 * segments), _INT32)
            rows = [row.ctypes.data for row in self._segments]
            self.struct.starts, self.struct.tokens, self.struct.first_block, self.struct.own = rows
        if len(self._blocks) < blocks:
            self._blocks = np.empty(2 * blocks, _INT32)
            self.struct.tables = self._blocks.ctypes.data


class PackedPool:
    """Implements `PagedKv` in the kernel's layout.

    keys `[layers, blocks, kv_heads, head_dim / p, BLOCK_TOKENS, p]` and values `[layers, blocks, kv_heads,
    BLOCK_TOKENS / p, padded, p]` with p = 1 for float32 and 2 for bfloat16; `padded` is head_dim in whole vectors. The
    rows of a block of one head lie together, and keys stand so that one vector holds a dimension of all its tokens.
    """

    def __init__(self, layout: KvLayout, blocks: int, kernel: Kernel) -> None:
        self.layout, self.blocks, self.kernel = layout, blocks, kernel
        pack = 2 if layout.dtype == "bfloat16" else 1
        head_dim, padded, dtype = layout.head_dim, -(-layout.head_dim // _LANES) * _LANES, getattr(torch, layout.dtype)
        head = (layout.layers, blocks, layout.kv_heads)
        self.keys = _empty(dtype, *head, head_dim // pack, BLOCK_TOKENS, pack)
        self.values = _empty(dtype, *head, BLOCK_TOKENS // pack, padded, pack)
        self.dtype = self.keys.dtype
        addresses = self.keys.data_ptr(), self.values.data_ptr()
        self._struct = _Pool(*addresses, blocks, layout.kv_heads, head_dim, pack == 2)
        self.address = ctypes.addressof(self._struct)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, destination in copies:
            self.keys[:, destination] = self.keys[:, source]
            self.values[:, destination] = self.values[:, source]

    def read(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        data = torch.empty(self.layout.chunk_shape(tokens), dtype=self.dtype)
        tables = Tables(self.blocks)
        tables.fill([Segment(start, tokens, block_ids)])
        for layer, (keys, values) in enumerate(data):
            self.kernel.get(self.address, tables.address, layer, keys.data_ptr(), values.data_ptr())
        return to_wire(data)

    def write(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        check_layout(self.layout, data)
        tensor, tables = from_wire(data, self.dtype), Tables(self.blocks)
        tables.fill([Segment(start, data.shape[2], block_ids)])
        for layer, (keys, values) in enumerate(tensor):
            rows = _Rows(k=keys.data_ptr(), v=values.data_ptr(), k_stride=keys.stride(0), v_stride=values.stride(0))
            self.kernel.put(self.address, tables.address, layer, ctypes.addressof(rows))


class NativeAttention:
    """Implements `Attention`; `windows` has one entry per layer. With one thread no thread is started.

    A batch is split between `threads` threads, which sleep when there is none. `sharing`: when a prefix
    that sequences have in common is attended to once for all; None: never.
    """

    def __init__(
        self, pool: PackedPool, windows: Sequence[int | None], threads: int = 1, sharing: Cost | None = SHARING
    ) -> None:
        self._pool = pool
        self._windows = [window or 0 for window in windows]
        self._tables = Tables(pool.blocks, sharing)
        self._rows = _Rows()
        self._rows_address = ctypes.addressof(self._rows)
        self._strides: tuple[tuple[int, ...], ...] | None = None
        self._handle = pool.kernel.create(pool.address, threads)
        self._close = weakref.finalize(self, pool.kernel.destroy, self._handle)

    def plan(self, segments: Sequence[Segment]) -> None:
        self._tables.fill(segments)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the kernel's attention, pool and planned batch, for what calls it natively."""
        return self._handle, self._pool.address, self._tables.address

    def share_between(self, group: int) -> None:
        """Tells how many query heads read one KV head, which decides when sharing pays."""
        if self._tables.sharing:
            self._tables.sharing = replace(self._tables.sharing, group=group)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(layer, q, k, v, None)

    def run_with_lse(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What `run` returns, and the natural log of the sum of each row's exponentials, float32 `[tokens, heads]`."""
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        return self._run(layer, q, k, v, lse), lse

    def _run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> Tensor:
        strides = (q.stride(), k.stride(), v.stride())
        if strides != self._strides:
            q, k, v = self._arrange(q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        rows, pool = self._rows, self._pool
        rows.q, rows.k, rows.v, rows.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        rows.lse = lse if lse is None else lse.data_ptr()
        rows.heads, rows.window = q.shape[1], self._windows[layer]
        pool.kernel.run(self._handle, pool.address, self._tables.address, layer, self._rows_address)
        return out

    def _arrange(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tells the kernel how rows lie, which is the same for all layers unless they had to be copied."""
        assert q.dtype == k.dtype == v.dtype == self._pool.dtype
        strides = (q.stride(), k.stride(), v.stride())
        q, k, v = (_rows_together(x) for x in (q, k, v))
        rows = self._rows
        self.share_between(q.shape[1] // k.shape[1])
        rows.q_stride, rows.k_stride, rows.v_stride = q.stride(0), k.stride(0), v.stride(0)
        self._strides = strides if strides == (q.stride(), k.stride(), v.stride()) else None
        return q, k, v


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor in memory of numpy, which asks for huge pages: scattered blocks then miss few page translations."""
    return torch.from_numpy(np.empty(shape, np.int16 if dtype == torch.bfloat16 else np.int32)).view(dtype)


def _rows_together(x: Tensor) -> Tensor:
    """`x` `[tokens, heads, head_dim]` with each token's elements side by side."""
    _, across, along = x.stride()
    return x if along == 1 and across == x.shape[2] else x.contiguous()
