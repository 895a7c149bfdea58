"""FlashInfer's back end over a stand-in for FlashInfer: tables, prefixes, pools, choice and captured steps.

What is checked is what FlashInfer is asked; that its kernels answer well only a GPU can tell (test_flashinfer_gpu.py).
"""

import logging
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention import choice
from kvmesh.engine.attention.flashinfer import CAPTURED_ROWS, FlashInferAttention, SavedBytes
from kvmesh.engine.attention.flashinfer_choice import checked_flashinfer, flashinfer_back_end, supports
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.flashinfer_tables import pages_of, places_of, tables_of
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native_build import CannotBuild
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.attention.reference import ReferenceAttention
from kvmesh.engine.batch import Batch, Draw, Row
from kvmesh.engine.cuda.graphs import BUCKETS, GraphedForward
from kvmesh.engine.cuda.staging import DirectStaging, InFlight
from kvmesh.engine.forward import EagerForward
from kvmesh.engine.loading import load
from kvmesh.engine.runner import TorchRunner, kv_layout
from kvmesh.errors import InvalidArgument
from kvmesh.types import BLOCK_TOKENS, SamplingParams
from tests.unit.engine.fake_flashinfer import FakeFlashInfer
from tests.unit.engine.tiny import tiny_model

BLOCKS = 80
ALWAYS = SavedBytes(least=1)
SMALL = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")


def page_pool(layout: KvLayout = SMALL, stored: torch.dtype | None = None) -> PagePool:
    return PagePool(layout, BLOCKS, "cpu", DirectStaging(), stored)


def both(pool: PagePool, windows: list[int | None], heads: int = 6, sharing=ALWAYS):
    """The back end, the module below it, and the textbook over the same KV."""
    textbook = KvPool(pool.layout, BLOCKS)
    textbook.data.copy_(torch.randn(textbook.data.shape, generator=torch.Generator().manual_seed(1)))
    pool.write(range(BLOCKS), 0, textbook.read(range(BLOCKS), 0, BLOCKS * BLOCK_TOKENS))
    flashinfer = FakeFlashInfer()
    attention = FlashInferAttention(pool, windows, heads, flashinfer, sharing)
    return attention, flashinfer, ReferenceAttention(textbook, windows)


def assert_equal_outputs(ways, segments, layout=SMALL, heads=6, tolerance=1e-5):
    tokens = sum(segment.tokens for segment in segments)
    fused = torch.randn(tokens, heads + 2 * layout.kv_heads, layout.head_dim)
    q, k, v = fused.split([heads, layout.kv_heads, layout.kv_heads], dim=1)
    for way in ways:
        way.plan(segments)
    for layer in range(layout.layers):
        found, expected = (way.run(layer, q, k, v) for way in ways)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@st.composite
def batches(draw, decode_only=False):
    """Segments whose tables are a tree: each continues an earlier one's full blocks, or nobody's."""
    free = random.Random(draw(st.integers(0, 9))).sample(range(BLOCKS), BLOCKS)
    segments: list[Segment] = []
    for _ in range(draw(st.integers(1, 7))):
        trunk: list[int] = []
        if segments and draw(st.booleans()):
            parent = draw(st.sampled_from(segments))
            trunk = list(parent.block_ids)[: draw(st.integers(0, parent.start // BLOCK_TOKENS))]
        start = len(trunk) * BLOCK_TOKENS + draw(st.integers(0, 40))
        tokens = 1 if decode_only else draw(st.sampled_from([1, 1, 1, 5, 20]))
        own = -(-(start + tokens) // BLOCK_TOKENS) - len(trunk)
        segments.append(Segment(start, tokens, [*trunk, *(free.pop() for _ in range(own))]))
    return segments


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([[None, None], [None, 9], [17, None]]), st.sampled_from([None, ALWAYS]))
def test_any_batch_equals_the_textbook(segments, windows, sharing):
    attention, _, textbook = both(page_pool(), windows, sharing=sharing)
    assert_equal_outputs((attention, textbook), segments)


def test_prefixes_within_prefixes_are_read_once_and_merged_by_level():
    trunk, branch = [0, 1, 2], [3, 4]
    tables = [[*trunk, *branch, 10], [*trunk, *branch, 11], [*trunk, 12], [*trunk, 13], [14, 15]]
    segments = [Segment((len(table) - 1) * BLOCK_TOKENS + 3, 1, table) for table in tables]
    attention, flashinfer, textbook = both(page_pool(), [None, None])
    assert_equal_outputs((attention, textbook), segments)
    assert flashinfer.calls == {"decode": 2, "prefill": 2, "merge": 4}


def test_a_prefix_that_does_not_pay_is_not_shared():
    segments = [Segment(35, 1, [0, 1, block]) for block in (5, 6)]
    attention, flashinfer, textbook = both(page_pool(), [None, None], sharing=SavedBytes(block_bytes=1, least=3))
    assert_equal_outputs((attention, textbook), segments)
    assert flashinfer.calls == {"decode": 2}


def test_a_batch_with_a_chunk_goes_through_prefill_kernels_alone():
    attention, flashinfer, textbook = both(page_pool(), [None, None])
    assert_equal_outputs((attention, textbook), [Segment(20, 7, [3, 4]), Segment(9, 1, [7])])
    assert flashinfer.calls == {"prefill": 2}


@pytest.mark.parametrize("heads", [2, 6, 8, 10])
def test_every_query_group_has_a_decode_kernel(heads):
    attention, _, textbook = both(page_pool(), [None, None], heads)
    assert_equal_outputs((attention, textbook), [Segment(20, 1, [3, 4])], heads=heads)


def test_tables_are_those_of_the_documentation():
    segments = [Segment(0, 18, [4, 2]), Segment(31, 1, [7, 5, 9]), Segment(32, 2, [1, 0, 3])]
    tables = tables_of(segments)
    pages = pages_of(segments, tables, 10)
    assert pages.queries.tolist() == [0, 18, 19, 21]
    assert pages.indptr.tolist() == [0, 2, 4, 7]
    assert pages.indices.tolist() == [4, 2, 7, 5, 1, 0, 3]
    assert pages.last_page_len.tolist() == [2, 16, 2]
    assert pages.lengths.tolist() == [segment.end for segment in segments]
    requests, positions = places_of(segments)
    assert requests.tolist() == [0] * 18 + [1] + [2] * 2
    assert positions.tolist() == [*range(18), 31, 32, 33]
    assert pages_of(segments, tables, 10, np.array([0, 1, 2])).indices.tolist() == [4, 2, 5, 3]
    filled = tables.filled(8, 2)
    assert filled.blocks.tolist() == [*tables.blocks, 8, 8]
    assert filled.first.tolist() == [*tables.first, len(tables.blocks) + 1, len(tables.blocks) + 2]


@pytest.mark.parametrize("segment", [Segment(16, 1, [3]), Segment(0, 1, [BLOCKS]), Segment(0, 1, [-1])])
def test_memory_that_is_not_the_pools_is_refused(segment):
    attention, _, _ = both(page_pool(), [None, None])
    with pytest.raises(IndexError, match="outside"):
        attention.plan([segment])


def test_latent_attention_equals_the_textbook():
    layout = KvLayout(1, 1, 576, "float32", planes=1)
    flashinfer, textbook = FakeFlashInfer(), ReferenceAttention(KvPool(layout, 8), [None])
    _, attention = flashinfer_back_end(4, "cpu", flashinfer)(layout, 8, [None])
    generator = torch.Generator().manual_seed(0)
    for segments in ([Segment(0, 37, [3, 1, 6]), Segment(0, 9, [5])], [Segment(37, 1, [3, 1, 6]), Segment(9, 2, [5])]):
        tokens = sum(segment.tokens for segment in segments)
        q, k = (torch.randn(tokens, heads, 576, generator=generator) for heads in (4, 1))
        outputs = []
        for way in (attention, textbook):
            way.plan(segments)
            outputs.append(way.run(0, q, k, k)[..., :512])
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    assert flashinfer.calls == {"latent": 2}


@pytest.mark.parametrize("layout", [SMALL, KvLayout(3, 1, 24, "bfloat16", planes=1)], ids=["two planes", "one"])
def test_kv_is_canonical_at_the_edge(layout):
    """What is written as tokens reads back as tokens, and as the pool of torch would have it."""
    pool, other = page_pool(layout), KvPool(layout, BLOCKS)
    data = np.random.default_rng(0).integers(0, 1000, layout.chunk_shape(50)).astype(layout.wire_dtype)
    for each in (pool, other):
        each.write([9, 2, 30, 4], 7, data)
        each.copy([(2, 5), (5, 6)])
    assert np.array_equal(pool.read([9, 2, 30, 4], 7, 50), data)
    assert np.array_equal(pool.read([6], 0, 16), other.read([2], 0, 16))
    with pytest.raises(InvalidArgument, match="does not fit the layout"):
        pool.write([0], 0, data[:1])


def test_a_read_that_has_begun_does_not_see_later_writes():
    pool = page_pool()
    before = np.full(SMALL.chunk_shape(4), 3.0, np.float32)
    pool.write([1], 0, before)
    result = pool.begin_read([1], 0, 4)
    pool.write([1], 0, before + 1)
    assert np.array_equal(result(), before)


def test_float8_halves_memory_and_stays_close():
    layout = KvLayout(2, 2, 8, "bfloat16")
    pool = page_pool(layout, torch.float8_e4m3fn)
    assert pool.data.itemsize == 1
    values = torch.randn(layout.chunk_shape(20), generator=torch.Generator().manual_seed(3)).bfloat16()
    pool.write([4, 1], 0, values.view(torch.int16).numpy().view(np.uint16))
    read = torch.from_numpy(pool.read([4, 1], 0, 20).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(read, values, rtol=0.07, atol=0.01)
    attention = FlashInferAttention(pool, [None, None], 4, FakeFlashInfer(), None)
    attention.plan([Segment(20, 1, [4, 1])])
    q, k, v = (torch.randn(1, heads, 8).bfloat16() for heads in (4, 2, 2))
    assert attention.run(0, q, k, v).dtype == torch.bfloat16


class Event:
    """A point in a stream that passes when told to."""

    def __init__(self, done: bool = False) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


def test_only_uploads_to_the_blocks_that_are_read_are_waited_for():
    flights, events = InFlight(), [Event(), Event(), Event(done=True)]
    for blocks, event in zip(([1, 2], [3], [7]), events, strict=True):
        flights.add(blocks, event)
    assert flights.take([5, 7]) == [events[2]]
    assert flights.take([2, 4]) == [events[0]]
    assert flights.take([1, 2, 7]) == []
    assert flights.take([3]) == [events[1]]


def test_uploads_that_are_done_are_forgotten():
    flights = InFlight()
    flights.add([1], Event(done=True))
    flights.take([2])
    assert flights.take([1]) == []


@pytest.mark.parametrize(
    ("layout", "able"),
    [
        (KvLayout(1, 3, 64, "bfloat16"), True),
        (KvLayout(1, 8, 128, "float16"), True),
        (KvLayout(1, 1, 576, "bfloat16", planes=1), True),
        (KvLayout(1, 3, 64, "float32"), False),
        (KvLayout(1, 3, 80, "bfloat16"), False),
        (KvLayout(1, 1, 288, "bfloat16", planes=1), False),
    ],
)
def test_what_the_kernels_take(layout, able):
    assert supports(layout) == able


SERVED = KvLayout(4, 2, 64, "bfloat16")


@pytest.mark.parametrize("layout", [SERVED, KvLayout(2, 1, 576, "bfloat16", planes=1)])
def test_a_module_that_agrees_with_the_textbook_is_taken(layout):
    pool, _ = checked_flashinfer(layout, 8, "cpu", FakeFlashInfer)(layout, 8, [None] * layout.layers)
    assert isinstance(pool, PagePool)


def test_one_that_does_not_is_refused():
    with pytest.raises(CannotBuild, match="is off by"):
        checked_flashinfer(SERVED, 8, "cpu", lambda: FakeFlashInfer({"prefill": 1.0}))


def test_one_that_decodes_to_nothing_is_refused():
    with pytest.raises(CannotBuild, match="is off by nan"):
        checked_flashinfer(SERVED, 8, "cpu", lambda: FakeFlashInfer({"decode": math.nan}))


def test_kernels_with_a_window_are_tried_where_the_model_has_one():
    def windows_fail():
        return FakeFlashInfer({"window": 1.0})

    checked_flashinfer(SERVED, 8, "cpu", windows_fail)
    with pytest.raises(CannotBuild, match="is off by"):
        checked_flashinfer(SERVED, 8, "cpu", windows_fail, [None, 4096])


def test_rows_of_decodes_go_through_fa2():
    for segments, backend in (
        ([Segment(0, 20, [3, 4]), Segment(0, 9, [7])], "auto"),
        ([Segment(20, 7, [3, 4]), Segment(9, 1, [7])], "fa2"),
    ):
        attention, flashinfer, textbook = both(page_pool(), [None, None])
        assert_equal_outputs((attention, textbook), segments)
        assert set(flashinfer.backends) == {backend}


def test_torch_serves_and_says_why_where_there_is_no_flashinfer(caplog):
    def missing() -> FakeFlashInfer:
        raise CannotBuild("flashinfer cannot be imported: no such module")

    with caplog.at_level(logging.WARNING):
        back_end = choice.choose(SERVED, "meta", 1, heads=8, flashinfer=missing)
    assert "attention: torch on meta: flashinfer cannot be imported" in caplog.text
    pool, _ = back_end(SERVED, 4, [None] * 4)
    assert isinstance(pool, KvPool)


class Again:
    """A recorder that computes again instead of replaying; counts what it recorded."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        return compute


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load(tiny_model("mistral", tmp_path_factory.mktemp("graphs"), sliding_window=24)[1], "float32")


def forwards(decoder, sharing=None):
    """The same step with and without graphs, each with a pool of its own, and what they stand on."""
    flashinfer, recorder = FakeFlashInfer(), Again()
    attentions = []
    for _ in range(2):
        pool = PagePool(kv_layout(decoder), BLOCKS, "cpu", DirectStaging())
        attentions.append(FlashInferAttention(pool, decoder.windows, decoder.config.heads, flashinfer, sharing))
    graphed = GraphedForward(decoder, attentions[0], recorder)
    return graphed, EagerForward(decoder, attentions[1]), flashinfer, recorder


@torch.inference_mode()
def test_captured_steps_equal_plain_ones_whatever_fills_them_up(decoder):
    graphed, plain, flashinfer, recorder = forwards(decoder)
    rng = random.Random(0)
    tables = [[4 * i, 4 * i + 1, 4 * i + 2] for i in range(5)]
    prompts = [Segment(0, 20 + i, table) for i, table in enumerate(tables)]
    tokens = [rng.randrange(96) for segment in prompts for _ in range(segment.tokens)]
    positions = [position for segment in prompts for position in range(segment.tokens)]
    torch.testing.assert_close(graphed(tokens, positions, prompts), plain(tokens, positions, prompts))
    assert recorder.recorded == 0
    for step, rows in enumerate((5, 3, 5, 1, 4)):
        segments = [Segment(20 + i + step, 1, tables[i]) for i in range(rows)]
        tokens, positions = [rng.randrange(96) for _ in segments], [segment.start for segment in segments]
        found, expected = (forward(tokens, positions, segments).clone() for forward in (graphed, plain))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert recorder.recorded == 3  # for 8, 4 and 1 rows
    assert flashinfer.calls["captured decode"] == 5 * len(decoder.windows)


@torch.inference_mode()
def test_steps_that_share_a_prefix_or_are_too_many_are_not_captured(decoder):
    graphed, _, _, recorder = forwards(decoder, ALWAYS)
    graphed([1, 2], [32, 32], [Segment(32, 1, [0, 1, 5]), Segment(32, 1, [0, 1, 6])])
    graphed([1] * 300, [0] * 300, [Segment(0, 1, [0])] * 300)
    assert recorder.recorded == 0
    graphed([1, 2], [32, 32], [Segment(32, 1, [0, 1, 5]), Segment(32, 1, [2, 3, 6])])
    assert recorder.recorded == 1
    assert BUCKETS[-1] == CAPTURED_ROWS


@torch.inference_mode()
def test_a_graph_that_fails_or_disagrees_is_not_used(decoder, caplog):
    def fails(compute):
        raise RuntimeError("out of memory")

    segments = [Segment(0, 1, [0])]
    graphed, plain, _, recorder = forwards(decoder)
    assert graphed.agrees()
    assert recorder.recorded == 1
    graphed._replays, graphed._recorder = {}, fails
    for _ in range(2):
        torch.testing.assert_close(graphed([5], [0], segments), plain([5], [0], segments))
    assert caplog.text.count("not replayed from graphs: out of memory") == 1
    assert not graphed.agrees()
    graphed, *_ = forwards(decoder)
    graphed._recorder = lambda compute: lambda: compute() + math.nan
    assert not graphed.agrees()
    with pytest.raises(IndexError):
        graphed([5], [40], [Segment(40, 1, [0])])
    assert graphed.captures


def test_a_runner_serves_on_it(decoder):
    """Greedy tokens of a whole runner, prefill and decode, are those on torch."""
    draw = (Draw(SamplingParams(max_tokens=1, temperature=0.0), 0, 0, (), ()),)
    served = []
    for back_end in (flashinfer_back_end(decoder.config.heads, "cpu", FakeFlashInfer()), None):
        runner = TorchRunner(decoder, 8, None, back_end)
        tokens = [runner.run(Batch((Row(list(range(40)), 0, [5, 2, 7, 1], draw),)))[0][0].token_id]
        for position in range(40, 50):
            tokens.append(runner.run(Batch((Row(tokens[-1:], position, [5, 2, 7, 1], draw),)))[0][0].token_id)
        served.append(tokens)
    assert served[0] == served[1]
