"""FlashInfer's own kernels against the textbook, graphs against plain steps, and KV through pinned memory."""

import pytest
import torch

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.agreement import BLOCKS, largest_error
from kvmesh.engine.attention.flashinfer import FlashInferAttention, SavedBytes
from kvmesh.engine.attention.flashinfer_choice import flashinfer_back_end
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import to_wire
from kvmesh.engine.cuda.graphs import CudaRecorder, GraphedForward
from kvmesh.engine.cuda.staging import CudaStaging
from kvmesh.engine.forward import EagerForward
from kvmesh.engine.loading import load
from kvmesh.engine.runner import kv_layout
from tests.unit.engine.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(1800),  # FlashInfer compiles what it has not compiled before.
]
CASES = {
    "tensor cores": (KvLayout(1, 8, 128, "bfloat16"), 32, None, None, 0.05),
    "cuda cores": (KvLayout(1, 3, 64, "bfloat16"), 9, None, None, 0.05),
    "window": (KvLayout(1, 8, 128, "bfloat16"), 32, 9, None, 0.05),
    "float8": (KvLayout(1, 8, 128, "bfloat16"), 32, None, torch.float8_e4m3fn, 0.3),
    "latent": (KvLayout(1, 1, 576, "bfloat16", planes=1), 16, None, None, 0.05),
}


@pytest.fixture(scope="module")
def flashinfer():
    return pytest.importorskip("flashinfer")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_equal_the_textbook(flashinfer, case):
    layout, heads, window, stored, tolerance = case
    build = flashinfer_back_end(heads, "cuda", flashinfer, stored, lambda layout: SavedBytes(least=1))
    assert largest_error(build(layout, BLOCKS, [window])[1], layout, heads, "cuda", window) < tolerance


@torch.inference_mode()
def test_graphs_equal_plain_steps(flashinfer, tmp_path):
    folder = tiny_model("llama", tmp_path, hidden_size=384, head_dim=64)[1]
    model = load(folder, "bfloat16", "cuda")
    pools = [PagePool(kv_layout(model), 16, "cuda", CudaStaging("cuda")) for _ in range(2)]
    ways = [FlashInferAttention(pool, model.windows, model.config.heads, flashinfer, None) for pool in pools]
    forwards = GraphedForward(model, ways[0], CudaRecorder()), EagerForward(model, ways[1])
    for step, rows in enumerate((5, 7, 3, 1, 7, 5)):
        segments = [Segment(step, 1, [row]) for row in range(rows)]
        graphed, plain = (forward([7 + step] * rows, [step] * rows, segments).float().clone() for forward in forwards)
        assert (graphed - plain).abs().max() < 0.05 * plain.abs().max()


def test_kv_comes_back_from_the_device_bit_by_bit():
    layout = KvLayout(4, 8, 128, "bfloat16")
    pool = PagePool(layout, 40, "cuda", CudaStaging("cuda"))
    data = to_wire(torch.randn(layout.chunk_shape(500)).bfloat16())
    pool.write(range(39, 0, -1), 20, data)
    begun = pool.begin_read(range(39, 0, -1), 20, 500)
    pool.write(range(39, 0, -1), 20, data * 0)
    assert (begun() == data).all()
