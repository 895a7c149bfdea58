"""FlashInfer's back end on a CUDA device: builds it, holds it against the textbook, then times it beside its limits.

    python bench/gpu.py [--sections check decode prefill shared transformers] [--seconds 120] [--batch 1 16 64]
                        [--prefix 1024 4096 16384] [--shared-batch 16 64 256] [--aot FOLDER] [--save FOLDER]
                        [--json FILE]

check         builds FlashInfer's libraries, side by side, once; each path's largest difference from the textbook;
              captured steps against plain ones; KV out and in through pinned memory
decode        one step of a model of Llama-3-8B's shape, beside the time that reading weights and KV takes at the copy
              rate measured here
prefill       a prompt in one chunk, beside the time that its products take at the matrix rate measured here
shared        a step whose sequences share a prefix: read once a sequence against once (Hydragen, arXiv 2402.05099)
transformers  decode steps of its `generate` on the same shape

Weights are random, sampling is greedy, and times are wall time of whole steps, sampling included: medians. A section
begins no case after --seconds, and says what it left out. --aot: libraries built ahead, as FOLDER/VERSION/NAME/NAME.so
for this very version of FlashInfer (bench/gpu_libraries.py makes them, without a device); --save: where to put those
that were compiled here. No device: no figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_libraries import SETS, build, keep, take
from gpu_limits import (
    LLAMA_3_8B,
    copy_rate,
    layer_weights,
    matrix_rate,
    median_seconds,
    random_decoder,
    weight_bytes,
)
from rich.console import Console
from rich.table import Table

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.agreement import BLOCKS, largest_error
from kvmesh.engine.attention.flashinfer import FlashInferAttention, SavedBytes
from kvmesh.engine.attention.flashinfer_api import FlashInfer, import_flashinfer
from kvmesh.engine.attention.flashinfer_choice import flashinfer_back_end, saved_bytes
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native_build import CannotBuild
from kvmesh.engine.attention.pool import to_wire
from kvmesh.engine.attention.prefixes import Cost
from kvmesh.engine.batch import Batch, Draw, Row
from kvmesh.engine.cuda.graphs import CudaRecorder, GraphedForward
from kvmesh.engine.cuda.staging import staging_for
from kvmesh.engine.forward import EagerForward
from kvmesh.engine.models.llama import Decoder
from kvmesh.engine.runner import TorchRunner
from kvmesh.types import BLOCK_TOKENS, SamplingParams

CONTEXT, PROMPT, OWN = 1024, 4096, 64
GREEDY = (Draw(SamplingParams(max_tokens=1, temperature=0.0), 0, 0, (), ()),)
Rows = list[dict[str, Any]]


@dataclass(slots=True)
class Bench:
    """What the sections share: the device, the module, the model once it is needed, and how long a section may take."""

    device: str
    flashinfer: FlashInfer
    seconds: float
    arguments: argparse.Namespace
    shape: dict[str, Any] = field(default_factory=lambda: LLAMA_3_8B)
    _model: Decoder | None = None

    @property
    def model(self) -> Decoder:
        self._model = self._model or random_decoder(self.shape, self.device)
        return self._model

    def runner(self, blocks: int, least: int | None = None) -> TorchRunner:
        """`least`: the bytes a layer that sharing must save; None: nothing is shared."""

        def sharing(layout: KvLayout) -> Cost | None:
            return None if least is None else SavedBytes(least=least)

        heads = self.model.config.heads
        back_end = flashinfer_back_end(heads, self.device, self.flashinfer, sharing=sharing)
        return TorchRunner(self.model, blocks, None, back_end)

    def within_time(self, cases: Sequence[Any], left_out: Rows) -> Iterator[Any]:
        """Those for which there is time; the first always."""
        end = time.monotonic() + self.seconds
        for number, case in enumerate(cases):
            if number and time.monotonic() > end:
                left_out.append({"left out": str(case)})
                continue
            yield case


@dataclass(frozen=True, slots=True)
class Way:
    """One way through the kernels."""

    name: str
    layout: KvLayout
    heads: int
    window: int | None = None
    stored: torch.dtype | None = None
    tolerance: float = 0.05

    def error(self, bench: Bench) -> float:
        build = flashinfer_back_end(
            self.heads, bench.device, bench.flashinfer, self.stored, lambda layout: SavedBytes(least=1)
        )
        _, attention = build(self.layout, BLOCKS, [self.window])
        return largest_error(attention, self.layout, self.heads, bench.device, self.window)


WAYS = (
    Way("GQA 32/8, d 128, shared", KvLayout(1, 8, 128, "bfloat16"), 32),
    Way("GQA 9/3, d 64, shared", KvLayout(1, 3, 64, "bfloat16"), 9),
    Way("window 9", KvLayout(1, 8, 128, "bfloat16"), 32, window=9),
    Way("float8 KV", KvLayout(1, 8, 128, "bfloat16"), 32, stored=torch.float8_e4m3fn, tolerance=0.3),
    Way("latent 512 + 64", KvLayout(1, 1, 576, "bfloat16", planes=1), 16),
)


def check(bench: Bench) -> Rows:
    rows: Rows = [{"path": "libraries", **outcome(_built, 1.0)}]
    for way in bench.within_time(WAYS, rows):
        rows.append({"path": way.name, **outcome(partial(way.error, bench), way.tolerance)})
    rows.append({"path": "captured steps", **outcome(partial(_captured_error, bench), 0.05)})
    rows.append({"path": "KV out and in", **outcome(partial(_moved_error, bench), 1e-9)})
    return rows


def _built() -> float:
    """It builds or it fails: there is nothing to compare."""
    build(SETS)
    return 0.0


def outcome(error: Callable[[], float], tolerance: float) -> dict[str, Any]:
    """One path's failure is a row, not the end."""
    began = time.perf_counter()
    try:
        found = error()
    except Exception as problem:
        return {"passed": False, "problem": f"{type(problem).__name__}: {problem}"[:300]}
    return {"passed": found < tolerance, "largest error": found, "seconds": time.perf_counter() - began}


def _captured_error(bench: Bench) -> float:
    """Largest difference of hidden states, relative to their size, over steps of growing and shrinking batches."""
    small = {**bench.shape, "num_hidden_layers": 2, "vocab_size": 256}
    model = random_decoder(small, bench.device)
    layout = KvLayout(2, model.config.kv_heads, model.config.head_dim, "bfloat16")
    attentions = []
    for _ in range(2):
        pool = PagePool(layout, 64, bench.device, staging_for(bench.device))
        attentions.append(FlashInferAttention(pool, model.windows, model.config.heads, bench.flashinfer, None))
    forwards = GraphedForward(model, attentions[0], CudaRecorder()), EagerForward(model, attentions[1])
    worst = 0.0
    for step, rows in enumerate((5, 7, 3, 1, 7, 5)):
        segments = [Segment(step, 1, [row]) for row in range(rows)]
        states = [forward([7 + step] * rows, [step] * rows, segments).float().clone() for forward in forwards]
        worst = max(worst, ((states[0] - states[1]).abs().max() / states[1].abs().max()).item())
    return worst


def _moved_error(bench: Bench) -> float:
    layout = KvLayout(4, 8, 128, "bfloat16")
    pool = PagePool(layout, 40, bench.device, staging_for(bench.device))
    data = to_wire(torch.randn(layout.chunk_shape(500)).bfloat16())
    pool.write(range(39, 0, -1), 20, data)
    begun = pool.begin_read(range(39, 0, -1), 20, 500)
    pool.write(range(39, 0, -1), 20, data * 0)
    return float((begun() != data).sum())


def decode(bench: Bench) -> Rows:
    rows: Rows = []
    rate = copy_rate(bench.device)
    for batch in bench.within_time(bench.arguments.batch, rows):
        blocks = batch * (CONTEXT // BLOCK_TOKENS)
        runner = bench.runner(blocks)
        seconds = step_seconds(runner, 0, batch, CONTEXT)
        needed = weight_bytes(bench.model) + batch * CONTEXT * runner.layout.bytes_per_token
        rows.append(
            {
                "batch": batch,
                "step ms": 1e3 * seconds,
                "tokens/s": batch / seconds,
                "limit ms": 1e3 * needed / rate,
                "of the limit": needed / rate / seconds,
                "copy GB/s": rate / 1e9,
            }
        )
    return rows


def prefill(bench: Bench) -> Rows:
    rows: Rows = []
    rate = matrix_rate(bench.device)
    config, runner = bench.model.config, bench.runner(PROMPT // BLOCK_TOKENS)
    for tokens in bench.within_time([PROMPT // 8, PROMPT // 2, PROMPT], rows):
        table = list(range(tokens // BLOCK_TOKENS))
        batch = Batch((Row([5] * tokens, 0, table, GREEDY),))
        seconds = median_seconds(partial(runner.run, batch), 5, 2)
        layers = sum(weight.numel() for weight in layer_weights(bench.model))
        attention = 2 * config.layers * config.heads * config.head_dim * tokens**2
        operations = 2 * layers * tokens + attention
        rows.append(
            {
                "tokens": tokens,
                "ms": 1e3 * seconds,
                "tokens/s": tokens / seconds,
                "of the limit": operations / rate / seconds,
                "matrix TFLOP/s": rate / 1e12,
            }
        )
    return rows


def shared(bench: Bench) -> Rows:
    """Both ways, whole steps; `default` is what the cost rule chooses."""
    rows: Rows = []
    cases = [(p, b) for p in bench.arguments.prefix for b in bench.arguments.shared_batch]
    blocks = max(p // BLOCK_TOKENS + b * (OWN // BLOCK_TOKENS) for p, b in cases)
    plain, once = bench.runner(blocks), bench.runner(blocks, least=1)
    saves = saved_bytes(plain.layout)
    for prefix, batch in bench.within_time(sorted(cases, key=lambda case: -case[0] * case[1]), rows):
        seconds = [step_seconds(runner, prefix, batch, OWN, repeats=5) for runner in (plain, once)]
        rows.append(
            {
                "prefix": prefix,
                "batch": batch,
                "plain ms": 1e3 * seconds[0],
                "shared ms": 1e3 * seconds[1],
                "ratio": seconds[0] / seconds[1],
                "default": "shared" if saves.pays(batch, prefix // BLOCK_TOKENS) else "plain",
            }
        )
    return rows


def transformers(bench: Bench) -> Rows:
    from transformers import AutoModelForCausalLM, LlamaConfig

    rows: Rows = []
    fields = {name: value for name, value in bench.shape.items() if name != "model_type"}
    with torch.device(bench.device):
        peer = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**fields), dtype=torch.bfloat16
        ).eval()
    for batch in bench.within_time(bench.arguments.batch, rows):
        prompt = torch.full((batch, 512), 5, device=bench.device)

        def generate(new: int, prompt: torch.Tensor = prompt) -> None:
            peer.generate(prompt, attention_mask=prompt > 0, max_new_tokens=new, min_new_tokens=new, do_sample=False)

        theirs = (median_seconds(lambda: generate(33), 3, 1) - median_seconds(lambda: generate(1), 3, 1)) / 32
        ours = step_seconds(bench.runner(batch * 528 // BLOCK_TOKENS), 0, batch, 528)
        rates = {"transformers tokens/s": batch / theirs, "kvmesh tokens/s": batch / ours}
        rows.append({"batch": batch, **rates, "ratio": theirs / ours})
    return rows


def step_seconds(runner: TorchRunner, prefix: int, batch: int, own: int, repeats: int = 10) -> float:
    """A decode step of sequences that share `prefix` tokens and have `own` ones each."""
    trunk, size = list(range(prefix // BLOCK_TOKENS)), own // BLOCK_TOKENS
    tables = [trunk + [len(trunk) + i * size + block for block in range(size)] for i in range(batch)]
    step = Batch(tuple(Row([5], prefix + own - 1, table, GREEDY) for table in tables))
    return median_seconds(lambda: runner.run(step), repeats)


SECTIONS: dict[str, Callable[[Bench], Rows]] = {
    "check": check,
    "decode": decode,
    "prefill": prefill,
    "shared": shared,
    "transformers": transformers,
}


def show(name: str, rows: Rows) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=name)
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a section begins no other case")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--shared-batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--aot", type=Path, help="libraries built ahead")
    parser.add_argument("--save", type=Path, help="where to keep the libraries compiled here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py measures a CUDA device, and torch sees none here")
    try:
        flashinfer = import_flashinfer()
    except CannotBuild as error:
        raise SystemExit(f"bench/gpu.py needs kvmesh[gpu]: {error}") from None
    if arguments.aot:
        take(flashinfer, arguments.aot)
    bench = Bench("cuda", flashinfer, arguments.seconds, arguments)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flashinfer": getattr(flashinfer, "__version__", ""),
    }
    for name in arguments.sections:
        with torch.inference_mode():
            report[name] = SECTIONS[name](bench)
        show(f"{name}, {report['device']}", report[name])
        if arguments.save:
            keep(flashinfer, arguments.save)
        if arguments.json:  # After each section: a run that is cut short has said something.
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
