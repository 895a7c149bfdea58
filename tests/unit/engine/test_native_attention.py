"""The native kernel against the textbook: any mix of rows, its own pool layout, its build and its fallback."""

import ctypes
import itertools
import logging
import random
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention import choice
from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native import Kernel, NativeAttention, PackedPool, supports
from kvmesh.engine.attention.native_build import TARGETS, CannotBuild, load_library, writable
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS

BLOCKS = 128
# Weights of values are rounded to bfloat16, as the output is.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


@pytest.fixture(scope="module", params=[TARGETS[0], ()], ids=["this-cpu", "any-cpu"])
def kernel(request, tmp_path_factory) -> Kernel:
    """The kernel for this CPU, and that for any CPU of its kind."""
    try:
        return Kernel(load_library(targets=[request.param]))
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")


def segments_of(lengths: list[tuple[int, int]], seed: int) -> list[Segment]:
    """Segments (start, tokens) with disjoint blocks in random order."""
    blocks = iter(random.Random(seed).sample(range(BLOCKS), BLOCKS))
    return [
        Segment(start, tokens, list(itertools.islice(blocks, -(-(start + tokens) // BLOCK_TOKENS))))
        for start, tokens in lengths
    ]


class Pair:
    """The kernel and the textbook over equal pools: what came before is written, all else is NaN."""

    def __init__(self, kernel: Kernel, layout: KvLayout, windows, segments, seed: int, threads: int = 1) -> None:
        self.packed, self.plain = PackedPool(layout, BLOCKS, kernel), KvPool(layout, BLOCKS)
        for tensor in (self.packed.keys, self.packed.values, self.plain.data):
            tensor.fill_(float("nan"))
        self.native = NativeAttention(self.packed, windows, threads)
        self.textbook = ReferenceAttention(self.plain, windows)
        self.segments, self.layout = segments, layout
        generator = np.random.default_rng(seed)
        for segment in segments:
            history = generator.standard_normal(layout.chunk_shape(segment.start), np.float32)
            if layout.dtype == "bfloat16":
                history = (history.view(np.uint32) >> 16).astype(np.uint16)
            self.packed.write(segment.block_ids, 0, history)
            self.plain.write(segment.block_ids, 0, history)

    def run(self, layer: int, q, k, v):
        self.native.plan(self.segments)
        self.textbook.plan(self.segments)
        return self.native.run(layer, q, k, v), self.textbook.run(layer, q, k, v)


def random_rows(segments, group: int, layout: KvLayout, seed: int):
    """q, k and v as the decoder has them: slices of one tensor."""
    total, kv_heads = sum(segment.tokens for segment in segments), layout.kv_heads
    generator = torch.Generator().manual_seed(seed)
    heads = (group + 2) * kv_heads
    fused = torch.randn(total, heads, layout.head_dim, generator=generator).to(getattr(torch, layout.dtype))
    return fused.split([group * kv_heads, kv_heads, kv_heads], dim=1)


lengths = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 60)), min_size=1, max_size=6)
decodes = st.lists(st.tuples(st.integers(0, 300), st.just(1)), min_size=1, max_size=6)
shapes = st.tuples(
    st.sampled_from([1, 2, 3, 4, 5, 8, 9]), st.integers(1, 3), st.sampled_from([6, 16, 32, 40, 64, 80, 96, 128])
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=40, deadline=None)
@given(st.one_of(lengths, decodes), shapes, st.sampled_from([None, 1, 5, 16, 33, 200]), st.integers(0, 99))
def test_the_kernel_equals_the_textbook(kernel, dtype, lengths, shape, window, seed):
    group, kv_heads, head_dim = shape
    segments, layout = segments_of(lengths, seed), KvLayout(2, kv_heads, head_dim, dtype)
    pair = Pair(kernel, layout, [window, None], segments, seed)
    q, k, v = random_rows(segments, group, layout, seed)
    for layer in (0, 1):
        native, textbook = pair.run(layer, q, k, v)
        assert native.shape == q.shape
        assert native.dtype == q.dtype
        torch.testing.assert_close(native, textbook, atol=TOLERANCE[dtype], rtol=0)
    for segment in segments:
        where = (segment.block_ids, 0, segment.end)
        assert np.array_equal(pair.packed.read(*where), pair.plain.read(*where))


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 40)), min_size=1, max_size=2), st.integers(0, 9))
def test_threads_and_split_keys_change_nothing_but_rounding(kernel, dtype, lengths, seed):
    segments, layout = segments_of(lengths, seed), KvLayout(1, 2, 64, dtype)
    rows = random_rows(segments, 12, layout, seed)
    for threads in (2, 3):
        native, textbook = Pair(kernel, layout, [None], segments, seed, threads).run(0, *rows)
        torch.testing.assert_close(native, textbook, atol=TOLERANCE[dtype], rtol=0)


@settings(max_examples=10, deadline=None)
@given(lengths, st.integers(0, 9))
def test_a_row_does_not_depend_on_its_batch(kernel, lengths, seed):
    """Bit for bit, so that batching changes no token."""
    segments, layout = segments_of(lengths, seed), KvLayout(1, 2, 32, "float32")
    rows = random_rows(segments, 3, layout, seed)
    together, _ = Pair(kernel, layout, [None], segments, seed).run(0, *rows)
    pair, first = Pair(kernel, layout, [None], segments, seed), 0
    for segment in segments:
        part = slice(first, first := first + segment.tokens)
        pair.segments = [segment]
        alone, _ = pair.run(0, *(x[part] for x in rows))
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("threads", [1, 2])
def test_log_sum_exp_is_that_of_the_scores(kernel, threads):
    segments, layout = [Segment(1500, 3, list(range(94))), Segment(0, 20, [95, 94])], KvLayout(1, 2, 64, "float32")
    pair = Pair(kernel, layout, [None], segments, 3, threads)
    q, k, v = random_rows(segments, 12, layout, 3)
    out, _ = pair.run(0, q, k, v)
    again, lse = pair.native.run_with_lse(0, q, k, v)
    assert torch.equal(out, again)
    keys = torch.from_numpy(pair.packed.read(segments[0].block_ids, 0, 1503))[0, 0].repeat_interleave(12, dim=1)
    scores = torch.einsum("qhd,khd->qhk", q[:3], keys) / 8
    for row in range(3):
        expected = scores[row, :, : 1501 + row].logsumexp(-1)
        torch.testing.assert_close(lse[row], expected, atol=1e-4, rtol=0)


def test_large_scores_do_not_overflow(kernel):
    segments, layout = [Segment(40, 2, [3, 1, 2])], KvLayout(1, 1, 16, "float32")
    pair = Pair(kernel, layout, [None], segments, 1)
    q, k, v = random_rows(segments, 4, layout, 1)
    native, textbook = pair.run(0, q * 1000, k, v)
    torch.testing.assert_close(native, textbook, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parts_of_blocks_are_written_and_read(kernel, dtype):
    layout = KvLayout(2, 3, 24, dtype)
    pool = PackedPool(layout, 8, kernel)
    data = np.random.default_rng(0).standard_normal(layout.chunk_shape(50), np.float32).astype(layout.wire_dtype)
    for first, last in itertools.pairwise((0, 5, 6, 23, 50)):
        pool.write([7, 0, 2, 5], first, data[:, :, first:last])
    assert np.array_equal(pool.read([7, 0, 2, 5], 0, 50), data)
    assert np.array_equal(pool.read([7, 0, 2, 5], 19, 14), data[:, :, 19:33])
    pool.copy([(0, 1), (1, 3)])
    assert np.array_equal(pool.read([7, 3, 2, 5], 0, 50), data)


def test_memory_outside_the_pool_is_refused(kernel):
    pool = PackedPool(KvLayout(1, 1, 16, "float32"), 4, kernel)
    attention = NativeAttention(pool, [None])
    for segment in (Segment(0, 1, [4]), Segment(0, 1, [-1]), Segment(16, 1, [0])):
        with pytest.raises(IndexError):
            attention.plan([segment])
    with pytest.raises(InvalidArgument, match="does not fit the layout"):
        pool.write([0], 0, np.zeros((1, 2, 4, 1, 8), np.float32))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (KvLayout(1, 1, 256, "bfloat16"), True),
        (KvLayout(1, 1, 258, "bfloat16"), False),
        (KvLayout(1, 1, 7, "float32"), False),
        (KvLayout(1, 1, 64, "float16"), False),
        (KvLayout(1, 1, 64, "float32", planes=1), False),
    ],
)
def test_what_the_kernel_takes(layout, expected):
    assert supports(layout) is expected


def test_the_kernel_is_compiled_once(tmp_path):
    build = partial(load_library, tmp_path, targets=[("-O0",)])
    try:
        build()
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")
    [library] = tmp_path.glob("*/*.so")
    before = library.stat()
    build()
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [library.parent]


def test_where_the_cache_is_read_only_a_private_folder_serves(tmp_path):
    (tmp_path / "file").touch()
    read_only, private = tmp_path / "file" / "kernels", tmp_path / "private"
    assert writable(tmp_path / "kernels", private) == tmp_path / "kernels"
    assert [writable(read_only, private) for _ in range(2)] == [private] * 2
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_is_not_trusted(tmp_path):
    (tmp_path / "file").touch()
    private = tmp_path / "private"
    private.mkdir()
    private.chmod(0o777)
    with pytest.raises(CannotBuild, match="not a folder of this user alone"):
        writable(tmp_path / "file" / "kernels", private)


def chosen(layout: KvLayout, caplog, library=load_library):
    with caplog.at_level(logging.INFO):
        _, attention = choice.choose(layout, "cpu", 1, library)(layout, 4, [None])
    return attention


def test_without_a_compiler_torch_serves_and_says_so(tmp_path, caplog):
    library = partial(load_library, tmp_path, ["c++-of-nowhere"])
    assert isinstance(chosen(KvLayout(1, 2, 64, "float32"), caplog, library), CpuAttention)
    assert [record.message for record in caplog.records] == [
        "attention: torch, for there is no native kernel: no compiler found of c++-of-nowhere"
    ]


RUBBISH = "while [ $1 != -o ]; do shift; done; echo rubbish > $2"


@pytest.mark.parametrize("script", ["exit 1", "exit 0", RUBBISH], ids=["fails", "writes-nothing", "writes-rubbish"])
def test_a_failed_build_falls_back(script, tmp_path, caplog):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    library = partial(load_library, tmp_path / "cache", [str(compiler)])
    assert isinstance(chosen(KvLayout(1, 2, 64, "float32"), caplog, library), CpuAttention)
    assert len(caplog.records) == 1


def test_a_wrong_kernel_is_not_used(tmp_path, caplog):
    """One that stores and computes nothing."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    names = ("create", "destroy", "run", "put", "get")
    source = tmp_path / "idle.c"
    functions = [f"long kvmesh_{name}(void) {{ return 0; }}" for name in names]
    source.write_text("\n".join([*functions, 'const char *kvmesh_isa(void) { return "none"; }']))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / "idle.so"), str(source)], check=True)
    attention = chosen(KvLayout(1, 2, 64, "float32"), caplog, lambda: ctypes.CDLL(str(tmp_path / "idle.so")))
    assert isinstance(attention, CpuAttention)
    assert "results are off" in caplog.text


def test_what_the_kernel_lacks_torch_serves(caplog):
    assert isinstance(chosen(KvLayout(1, 2, 64, "float16"), caplog), CpuAttention)
    assert "float16" in caplog.text


def test_the_kernel_is_chosen_where_it_works(kernel, caplog):
    assert isinstance(chosen(KvLayout(1, 2, 64, "bfloat16"), caplog), NativeAttention)
    assert "attention: native kernel for" in caplog.text
