"""FlashInfer's back end on a CUDA device: builds it, holds it against the textbook, then times it beside its limits.

    python bench/gpu.py [--sections check decode prefill shared transformers] [--seconds 90] [--limit 150]
                        [--batch 1 16 64] [--prefix 1024 4096 16384] [--shared-batch 16 64 256]
                        [--aot LIBRARIES] [--save LIBRARIES] [--json FILE]

check         KV out and in through pinned memory; builds FlashInfer's libraries path by path, and each path's largest
              difference from the textbook; captured steps against plain ones
decode        one step of a model of Llama-3-8B's shape, beside the time that reading weights and KV takes at the copy
              rate measured here
prefill       a prompt in one chunk, beside the time that its products take at the matrix rate measured here
shared        a step whose sequences share a prefix: read once a sequence against once (Hydragen, arXiv 2402.05099)
transformers  decode steps of its `generate` on the same shape

Weights are random, sampling is greedy, and times are wall time of whole steps, sampling included: medians. A section
begins no case after --seconds, and says what it left out.

Each section is a process, killed after --limit seconds (check, which compiles, after twice that): what it breaks on the
device is its own. The JSON file is whole after every row: {SECTION: {"rows": [...], "error": "what ended it"}}. The
exit status is 1 if a section failed or a path did not pass, once all have run.

--aot: libraries built ahead for this very version of FlashInfer (bench/gpu_libraries.py makes them, without a device):
a folder that holds VERSION/NAME/NAME.so, or a tar file of it, NAME.tar. --save: where to add those that are compiled
here, likewise, each time that some are. No device: no figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_libraries import build, keep, take
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
from rich.text import Text

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
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What is known so far, in a JSON file that is whole at any moment. One process at a time writes to it."""

    path: Path

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def write(self, content: dict[str, Any]) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)

    def add(self, section: str, row: Figures) -> None:
        content = self.read()
        content.setdefault(section, {"rows": []})["rows"].append(row)
        self.write(content)

    def fail(self, section: str, error: str) -> None:
        """The first error counts: what follows is its consequence."""
        content = self.read()
        content.setdefault(section, {"rows": []}).setdefault("error", error)
        self.write(content)


@dataclass(slots=True)
class Bench:
    """What a section needs: the device, the module, the model once it is asked for, and where its rows go."""

    device: str
    flashinfer: FlashInfer
    arguments: argparse.Namespace
    add: Callable[[Figures], None]
    shape: dict[str, Any] = field(default_factory=lambda: LLAMA_3_8B)
    _model: Decoder | None = None

    @property
    def model(self) -> Decoder:
        if self._model is None:
            self.build("llama")
            self._model = random_decoder(self.shape, self.device)
        return self._model

    def build(self, libraries: str) -> None:
        """Compiles what is not there yet, and saves it at once: what comes next may not return."""
        build([libraries])
        if self.arguments.save:
            keep(self.flashinfer, self.arguments.save, [libraries])

    def runner(self, blocks: int, least: int | None = None) -> TorchRunner:
        """`least`: the bytes a layer that sharing must save; None: nothing is shared."""

        def sharing(layout: KvLayout) -> Cost | None:
            return None if least is None else SavedBytes(least=least)

        heads = self.model.config.heads
        back_end = flashinfer_back_end(heads, self.device, self.flashinfer, sharing=sharing)
        return TorchRunner(self.model, blocks, None, back_end)

    def within_time(self, cases: Sequence[Any]) -> Iterator[Any]:
        """Those for which there is time; the first always."""
        end = time.monotonic() + self.arguments.seconds
        for number, case in enumerate(cases):
            if number and time.monotonic() > end:
                self.add({"left out": str(case)})
                continue
            yield case


@dataclass(frozen=True, slots=True)
class Way:
    """One way through the kernels, and the set of libraries that it adds to those before it."""

    name: str
    libraries: str
    layout: KvLayout
    heads: int
    window: int | None = None
    stored: torch.dtype | None = None
    tolerance: float = 0.05

    def error(self, bench: Bench) -> float:
        bench.build(self.libraries)
        back_end = flashinfer_back_end(
            self.heads, bench.device, bench.flashinfer, self.stored, lambda layout: SavedBytes(least=1)
        )
        _, attention = back_end(self.layout, BLOCKS, [self.window])
        return largest_error(attention, self.layout, self.heads, bench.device, self.window)


WAYS = (
    Way("GQA 32/8, d 128, shared", "llama", KvLayout(1, 8, 128, "bfloat16"), 32),
    Way("GQA 9/3, d 64, shared", "smollm2", KvLayout(1, 3, 64, "bfloat16"), 9),
    Way("window 9", "window", KvLayout(1, 8, 128, "bfloat16"), 32, window=9),
    Way("float8 KV", "float8", KvLayout(1, 8, 128, "bfloat16"), 32, stored=torch.float8_e4m3fn, tolerance=0.3),
    Way("latent 512 + 64", "latent", KvLayout(1, 1, 576, "bfloat16", planes=1), 16),
)


def check(bench: Bench) -> None:
    """Captures come last: one that fails can leave the device's state behind for what follows."""
    bench.add({"path": "KV out and in", **outcome(partial(_moved_error, bench), 1e-9)})
    for way in WAYS:
        bench.add({"path": way.name, **outcome(partial(way.error, bench), way.tolerance)})
    bench.add({"path": "captured steps", **outcome(partial(_captured_error, bench), 0.05)})


def outcome(error: Callable[[], float], tolerance: float) -> Figures:
    """One path's failure is a row, not the end. NaN does not pass."""
    began = time.perf_counter()
    try:
        found = error()
    except Exception as problem:
        traceback.print_exc()
        return {"passed": False, "problem": told(problem), "seconds": time.perf_counter() - began}
    return {"passed": found < tolerance, "largest error": found, "seconds": time.perf_counter() - began}


def told(problem: Exception) -> str:
    """All of it, what happened first: a compiler's message is long, and its end matters."""
    stack = "".join(traceback.format_tb(problem.__traceback__))
    return f"{type(problem).__name__}: {problem}\n{stack}"


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if there is any, which Python's max would pass over."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def _captured_error(bench: Bench) -> float:
    """Largest difference of hidden states, relative to their size, over steps of growing and shrinking batches."""
    small = {**bench.shape, "num_hidden_layers": 2, "vocab_size": 256}
    model = random_decoder(small, bench.device)
    layout = KvLayout(2, model.config.kv_heads, model.config.head_dim, "bfloat16")
    attentions = []
    for _ in range(2):
        pool = PagePool(layout, 64, bench.device, staging_for(bench.device))
        attentions.append(FlashInferAttention(pool, model.windows, model.config.heads, bench.flashinfer, None))
    graphed, plain = GraphedForward(model, attentions[0], CudaRecorder()), EagerForward(model, attentions[1])
    errors = []
    for step, rows in enumerate((5, 7, 3, 1, 7, 5)):
        segments = [Segment(step, 1, [row]) for row in range(rows)]
        ways = (graphed, plain)
        replayed, computed = (way([7 + step] * rows, [step] * rows, segments).float().clone() for way in ways)
        errors.append(((replayed - computed).abs().max() / computed.abs().max()).item())
    if not graphed.captures:  # It then computes plainly, which would agree.
        raise RuntimeError("a capture failed: the log says why")
    return worst(errors)


def _moved_error(bench: Bench) -> float:
    layout = KvLayout(4, 8, 128, "bfloat16")
    pool = PagePool(layout, 40, bench.device, staging_for(bench.device))
    data = to_wire(torch.randn(layout.chunk_shape(500)).bfloat16())
    pool.write(range(39, 0, -1), 20, data)
    begun = pool.begin_read(range(39, 0, -1), 20, 500)
    pool.write(range(39, 0, -1), 20, data * 0)
    return float((begun() != data).sum())


def decode(bench: Bench) -> None:
    rate = copy_rate(bench.device)
    for batch in bench.within_time(bench.arguments.batch):
        blocks = batch * (CONTEXT // BLOCK_TOKENS)
        runner = bench.runner(blocks)
        seconds = step_seconds(runner, 0, batch, CONTEXT)
        needed = weight_bytes(bench.model) + batch * CONTEXT * runner.layout.bytes_per_token
        bench.add(
            {
                "batch": batch,
                "step ms": 1e3 * seconds,
                "tokens/s": batch / seconds,
                "limit ms": 1e3 * needed / rate,
                "of the limit": needed / rate / seconds,
                "copy GB/s": rate / 1e9,
            }
        )


def prefill(bench: Bench) -> None:
    rate = matrix_rate(bench.device)
    config, runner = bench.model.config, bench.runner(PROMPT // BLOCK_TOKENS)
    for tokens in bench.within_time([PROMPT // 8, PROMPT // 2, PROMPT]):
        table = list(range(tokens // BLOCK_TOKENS))
        batch = Batch((Row([5] * tokens, 0, table, GREEDY),))
        seconds = median_seconds(partial(runner.run, batch), 5, 2)
        layers = sum(weight.numel() for weight in layer_weights(bench.model))
        attention = 2 * config.layers * config.heads * config.head_dim * tokens**2
        operations = 2 * layers * tokens + attention
        bench.add(
            {
                "tokens": tokens,
                "ms": 1e3 * seconds,
                "tokens/s": tokens / seconds,
                "of the limit": operations / rate / seconds,
                "matrix TFLOP/s": rate / 1e12,
            }
        )


def shared(bench: Bench) -> None:
    """Both ways, whole steps; `default` is what the cost rule chooses."""
    cases = [(p, b) for p in bench.arguments.prefix for b in bench.arguments.shared_batch]
    blocks = max(p // BLOCK_TOKENS + b * (OWN // BLOCK_TOKENS) for p, b in cases)
    plain, once = bench.runner(blocks), bench.runner(blocks, least=1)
    saves = saved_bytes(plain.layout)
    for prefix, batch in bench.within_time(sorted(cases, key=lambda case: -case[0] * case[1])):
        seconds = [step_seconds(runner, prefix, batch, OWN, repeats=5) for runner in (plain, once)]
        bench.add(
            {
                "prefix": prefix,
                "batch": batch,
                "plain ms": 1e3 * seconds[0],
                "shared ms": 1e3 * seconds[1],
                "ratio": seconds[0] / seconds[1],
                "default": "shared" if saves.pays(batch, prefix // BLOCK_TOKENS) else "plain",
            }
        )


def transformers(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = {name: value for name, value in bench.shape.items() if name != "model_type"}
    with torch.device(bench.device):
        peer = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**fields), dtype=torch.bfloat16
        ).eval()
    for batch in bench.within_time(bench.arguments.batch):
        prompt = torch.full((batch, 512), 5, device=bench.device)

        def generate(new: int, prompt: torch.Tensor = prompt) -> None:
            peer.generate(prompt, attention_mask=prompt > 0, max_new_tokens=new, min_new_tokens=new, do_sample=False)

        theirs = (median_seconds(lambda: generate(33), 3, 1) - median_seconds(lambda: generate(1), 3, 1)) / 32
        ours = step_seconds(bench.runner(batch * 528 // BLOCK_TOKENS), 0, batch, 528)
        rates = {"transformers tokens/s": batch / theirs, "kvmesh tokens/s": batch / ours}
        bench.add({"batch": batch, **rates, "ratio": theirs / ours})


def step_seconds(runner: TorchRunner, prefix: int, batch: int, own: int, repeats: int = 10) -> float:
    """A decode step of sequences that share `prefix` tokens and have `own` ones each."""
    trunk, size = list(range(prefix // BLOCK_TOKENS)), own // BLOCK_TOKENS
    tables = [trunk + [len(trunk) + i * size + block for block in range(size)] for i in range(batch)]
    step = Batch(tuple(Row([5], prefix + own - 1, table, GREEDY) for table in tables))
    return median_seconds(lambda: runner.run(step), repeats)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "check": check,
    "decode": decode,
    "prefill": prefill,
    "shared": shared,
    "transformers": transformers,
}


def recorded(name: str, section: Callable[[], None], report: Report) -> None:
    """Runs it in this process; what it raises is in the report too."""
    try:
        section()
    except Exception as problem:
        report.fail(name, told(problem))
        raise


def supervise(name: str, command: Sequence[str], limit: float, report: Report) -> None:
    """Runs a section in a process of its own; an end that it could not record itself is recorded here."""
    # A group of its own, so that the compilers it has started end with it.
    process = subprocess.Popen(command, process_group=0)
    error = None
    try:
        if status := process.wait(limit):
            error = f"ended with status {status}"
    except subprocess.TimeoutExpired:
        error = f"killed after {limit:g} s"
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints where it was.
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # A driver may hold it even now.
            process.wait(10)
    if error:
        report.fail(name, error)


def failures(content: dict[str, Any], sections: Sequence[str]) -> list[str]:
    """Sections that failed, or a path of which did not pass."""
    found = [(name, content.get(name, {"rows": []})) for name in sections]
    return [name for name, one in found if "error" in one or not all(row.get("passed", True) for row in one["rows"])]


def show(title: str, section: dict[str, Any]) -> None:
    """Of texts the first line: the rest has been printed, and is in the report."""
    rows = section["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=title)
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        # A Text, for in a plain string rich takes brackets for its own.
        table.add_row(*(Text(f"{cell:.3g}" if isinstance(cell, float) else first_line(cell)) for cell in cells))
    console = Console(width=140)
    console.print(table)
    if "error" in section:
        console.print(Text(first_line(section["error"])))


def first_line(value: object) -> str:
    return str(value).partition("\n")[0]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=90.0, help="after which a section begins no other case")
    parser.add_argument("--limit", type=float, default=150.0, help="after which a section is killed; check: twice that")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--shared-batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--aot", type=Path, help="libraries built ahead: a folder or a tar file")
    parser.add_argument("--save", type=Path, help="where to keep the libraries compiled here: a folder or a tar file")
    parser.add_argument("--json", type=Path)
    # A section's own process: its rows go to --json, which is there.
    parser.add_argument("--alone", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = options()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py measures a CUDA device, and torch sees none here")
    try:
        flashinfer = import_flashinfer()
    except CannotBuild as error:
        raise SystemExit(f"bench/gpu.py needs kvmesh[gpu]: {error}") from None
    if arguments.alone:
        report = Report(arguments.json)
        bench = Bench("cuda", flashinfer, arguments, partial(report.add, arguments.alone))
        with torch.inference_mode():
            recorded(arguments.alone, partial(SECTIONS[arguments.alone], bench), report)
        return
    if arguments.aot:
        take(flashinfer, arguments.aot)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # A section ends with this process.
    with tempfile.TemporaryDirectory() as folder:
        run_all(arguments, flashinfer, Report(arguments.json or Path(folder) / "gpu.json"))


def run_all(arguments: argparse.Namespace, flashinfer: FlashInfer, report: Report) -> None:
    device, version = torch.cuda.get_device_name(), getattr(flashinfer, "__version__", "")
    report.write({"device": device, "torch": torch.__version__, "flashinfer": version})
    script = [sys.executable, "-X", "faulthandler", __file__, *sys.argv[1:], "--json", str(report.path)]
    for name in arguments.sections:
        supervise(name, [*script, "--alone", name], arguments.limit * (2 if name == "check" else 1), report)
        show(f"{name}, {device}", report.read().get(name, {"rows": []}))
    if failed := failures(report.read(), arguments.sections):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
