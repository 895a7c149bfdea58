"""Time to first token of a stored prefix over a slow link: adaptive streaming beside every fixed choice, in one run.

    python bench/streaming.py --text FILE [--links 50,100,200,1000,0] [--json FILE] [--plot FILE] [--kv FILE]

A real kvstore runs in a network namespace behind a link of so many Mbit/s (veth and `tc tbf`, both directions; 0: no
limit), a real decode worker of each codec outside. Each request has 4,096 tokens whose KV is stored and 16 more; its
TTFT is from the call to the first token. `text` computes all of it, a codec's name fetches that, `transform:k` so many
quality layers of it. For `adaptive` a prefill worker outside computes the prefix and puts it over the link, as suits
what readers have told of theirs. Each figure is a median; the schemes take turns, so that all see the same machine.

With `--slo`, the link's rate changes every quarter of a second: log-uniform from 0.1 to 10 Gbit/s, divided by the ratio
of Mistral-7B's KV to this model's, fixed seeds. Each scheme gets the same requests under the same weather; what counts
is the share that took longer than the SLO. The KV is computed once and kept in `--kv`. Needs root, `ip` and `tc`; where
they are not there it says so and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from slow_link import problem
from streaming_mesh import ASKED, DTYPE, STORED, Answer, Mesh, Scheme, running

from kvmesh.engine.batch import Batch, Row
from kvmesh.hub import resolve
from kvmesh.kv import bitstream
from kvmesh.kv.codec import Codec, KvArray
from kvmesh.kv.codecs.adaptive import Adaptive
from kvmesh.kv.codecs.choice import find_profile, open_codec
from kvmesh.types import BLOCK_TOKENS, CHUNK_TOKENS
from kvmesh_router.readers import REPLIES

ADAPTIVE, TEXT = "adaptive", "text"
MODEL = "smollm2-135m-instruct"
MISTRAL_BYTES = 131_072
"""Of KV for a token of Mistral-7B in half precision."""
KV_BYTES = 23_040
"""Of this model's."""
LEARNING = 3
"""Times that the prefix is published for a link: what readers tell of it in between decides how KV is stored."""
LONG = 2.5
"""Seconds beyond which one measurement says enough."""
WEATHER_SECONDS, WEATHER_BITS = 0.25, (0.1e9, 10e9)


# Preparing -----------------------------------------------------------------------------------------------------------


def prompt_of(model: str, text: Path) -> list[int]:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(resolve(model).tokenizer_path)).encode(text.read_text(encoding="utf-8")).ids
    if len(ids) < STORED + ASKED:
        sys.exit(f"{text} has {len(ids)} tokens, {STORED + ASKED} are needed")
    return list(ids[: STORED + ASKED])


def stored_kv(model: str, prompt: Sequence[int], kept: Path | None, bar: Progress) -> KvArray:
    """KV of the stored tokens, computed unless `kept` has it."""
    if kept and kept.is_file():
        return np.asarray(np.load(kept))
    from kvmesh.engine.build import build_runner

    blocks = range(STORED // BLOCK_TOKENS)
    runner = build_runner(resolve(model), DTYPE, blocks=len(blocks), precision="bf16")
    for start in bar.track(range(0, STORED, 512), description="computing the prefix"):
        runner.run(Batch((Row(prompt[start : start + 512], start, blocks),)))
    data = runner.read_kv(blocks, 0, STORED)
    if kept:
        np.save(kept, data)
    return data


def encode(data: KvArray, codec: Codec, bar: Progress) -> list[bytes]:
    starts = bar.track(range(0, STORED, CHUNK_TOKENS), description=f"encoding as {codec.format.name}")
    pieces = ((np.ascontiguousarray(data[:, :, start : start + CHUNK_TOKENS]), start) for start in starts)
    return [bitstream.encode(piece, DTYPE, 0, codec, start) for piece, start in pieces]


def fixed_choices(arguments: argparse.Namespace, data: KvArray, bar: Progress) -> list[Scheme]:
    """Those that are wanted: text, each codec that the adaptive one chooses from, and each quality of the smallest."""
    layers, planes, _, heads, dim = data.shape
    folder = resolve(arguments.model)
    profile = find_profile(arguments.profile, folder.path, folder.name)
    codec = open_codec(ADAPTIVE, (layers, planes, heads, dim), profile)
    assert isinstance(codec, Adaptive)
    wanted = [name for name in arguments.schemes.split(",") if name]
    named = {name.partition(":")[0] for name in wanted}
    schemes = [Scheme(TEXT, "raw")]
    for member in codec.members:
        name = member.format.name
        chunks = encode(data, member, bar) if name in named or not wanted else []
        qualities = max((len(bitstream.read_header(bits).layer_ends) for bits in chunks), default=1)
        if qualities == 1:
            schemes.append(Scheme(name, name, chunks))
        else:
            schemes += [Scheme(f"{name}:{q}", name, cut(chunks, q)) for q in range(1, qualities + 1)]
    return [each for each in schemes if each.name in wanted or not wanted]


def cut(whole: Sequence[bytes], quality: int) -> list[bytes]:
    return [bytes(bitstream.cut(bits, quality)) for bits in whole]


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """Medians of one scheme on one link; `mbit` 0: no limit. Of a changing link: `violations`, as a share."""

    mbit: float | None
    scheme: str
    ttft_seconds: float
    fetched_bytes: float
    qualities: dict[str, int]
    recomputed_tokens: float
    repeats: int
    violations: float | None = None


def figure(mbit: float | None, name: str, answers: Sequence[Answer], slo: float | None = None) -> Figure:
    middle = sorted(answers, key=lambda answer: answer.seconds)[len(answers) // 2]
    late = None if slo is None else sum(answer.seconds > slo for answer in answers) / len(answers)
    seconds = statistics.median(answer.seconds for answer in answers)
    return Figure(mbit, name, seconds, middle.bytes, middle.qualities, middle.recomputed, len(answers), late)


async def measure(
    mesh: Mesh, fixed: Sequence[Scheme], links: Sequence[float], repeats: int, figures: list[Figure], bar: Progress
) -> None:
    """Every scheme on every link, once more than is counted.

    A fixed choice that took LONG is not repeated; computing from text, which no link changes, is measured once.
    """
    adaptive = Scheme(ADAPTIVE, ADAPTIVE)
    text: list[Answer] = []
    task = bar.add_task("constant links", total=len(links) * (LEARNING + repeats + 1))
    for mbit in links:
        mesh.link.limit(mbit * 1e6 or None)
        for _ in range(LEARNING):
            adaptive = await learnt(mesh, adaptive)
            bar.advance(task)
        answers: dict[str, list[Answer]] = {scheme.name: [] for scheme in (*fixed, adaptive)}
        answers |= {TEXT: text} if TEXT in answers else {}
        for _ in range(repeats + 1):
            for scheme in (*fixed, adaptive):
                given = answers[scheme.name]
                if scheme is adaptive or not given or given[-1].seconds <= LONG:
                    given.append(await mesh.ask(scheme))
            bar.advance(task)
        figures += [figure(mbit, name, given[-repeats:]) for name, given in answers.items()]


async def learnt(mesh: Mesh, scheme: Scheme) -> Scheme:
    """Published anew, after as many replies as it takes to know a link anew."""
    for _ in range(REPLIES if scheme.published else 0):
        await mesh.ask(scheme)
    return await mesh.publish(scheme)


async def weather(mesh: Mesh, seed: int) -> None:
    """Changes the link for ever, the same way for the same seed."""
    rng, scale = np.random.default_rng(seed), MISTRAL_BYTES / KV_BYTES
    low, high = np.log(WEATHER_BITS)
    while True:
        await asyncio.to_thread(mesh.link.limit, float(np.exp(rng.uniform(low, high))) / scale)
        await asyncio.sleep(WEATHER_SECONDS)


@asynccontextmanager
async def changing(mesh: Mesh, seed: int) -> AsyncIterator[None]:
    """From the middle of a spell on."""
    task = asyncio.create_task(weather(mesh, seed))
    await asyncio.sleep(WEATHER_SECONDS / 2)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def under_weather(mesh: Mesh, fixed: Sequence[Scheme], slo: float, requests: int, bar: Progress) -> list[Figure]:
    """Each scheme gets the same requests, each at the beginning of the same spell."""
    adaptive = Scheme(ADAPTIVE, ADAPTIVE)
    for seed in bar.track(range(LEARNING), description="publishing under a changing link"):
        async with changing(mesh, requests + seed):
            adaptive = await learnt(mesh, adaptive)
    schemes = (*fixed, adaptive)
    answers: dict[str, list[Answer]] = {scheme.name: [] for scheme in schemes}
    for seed in bar.track(range(requests), description="changing link"):
        for scheme in schemes:
            if scheme.name == TEXT and answers[TEXT]:
                answers[TEXT] += answers[TEXT][:1]
                continue
            async with changing(mesh, seed):
                answers[scheme.name].append(await mesh.ask(scheme, slo))
    return [figure(None, name, given, slo) for name, given in answers.items()]


# Showing -------------------------------------------------------------------------------------------------------------


def table_of(figures: Sequence[Figure]) -> Table:
    table = Table(*("link", "scheme", "TTFT", "× adaptive", "fetched", "chunks", "computed"), box=None)
    for each in figures:
        own = next(f for f in figures if f.mbit == each.mbit and f.scheme == ADAPTIVE).ttft_seconds
        chunks = " ".join(f"{count}×{name}" for name, count in sorted(each.qualities.items()))
        link = "no limit" if not each.mbit else f"{each.mbit:g} Mbit/s"
        cells = (f"{each.ttft_seconds:.2f} s", f"{each.ttft_seconds / own:.2f}", f"{each.fetched_bytes / 1e6:.1f} MB")
        table.add_row(link, each.scheme, *cells, chunks, f"{each.recomputed_tokens:g}")
    return table


def slo_table(figures: Sequence[Figure], slo: float) -> Table:
    table = Table("scheme", f"later than {slo:g} s", "median TTFT", "requests", box=None)
    for each in figures:
        table.add_row(each.scheme, f"{each.violations or 0:.0%}", f"{each.ttft_seconds:.2f} s", str(each.repeats))
    return table


def plot(figures: Sequence[Figure], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    links = list(dict.fromkeys(each.mbit for each in figures))
    for name in dict.fromkeys(each.scheme for each in figures):
        times = [each.ttft_seconds for each in figures if each.scheme == name]
        style: dict[str, Any] = {"color": "black", "linewidth": 2.5} if name == ADAPTIVE else {}
        axes.plot(range(len(links)), times, marker="o", label=name, **style)
    axes.set_xticks(range(len(links)), ["no limit" if not mbit else f"{mbit:g}" for mbit in links])
    axes.set(xlabel="link, Mbit/s", ylabel="time to first token, s", yscale="log")
    axes.set_title(f"{STORED} stored tokens and {ASKED} more, {MODEL}, {DTYPE} KV", fontsize=10)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=150)


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what the prompt is taken from")
    parser.add_argument("--links", default="50,100,200,1000,0", help="Mbit/s; 0 is no limit")
    parser.add_argument("--schemes", default="", help="fixed ones, such as int8,transform:3; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the decode worker's engine")
    parser.add_argument("--slo", type=float, help="seconds; measures violations under a changing link")
    parser.add_argument("--requests", type=int, default=20, help="of each scheme under the changing link")
    parser.add_argument("--kv", type=Path, help="where to keep the prefix's KV between runs (.npy)")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--profile", type=Path, help="of the codecs; default: the model's")
    parser.add_argument("--quality", type=int, default=2, help="the coarsest quality of the adaptive scheme")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


@dataclass
class Results:
    """What is measured so far: a run that is stopped shows it."""

    constant: list[Figure] = field(default_factory=list)
    changing: list[Figure] = field(default_factory=list)

    def show(self, arguments: argparse.Namespace) -> None:
        console = Console(width=140)
        if self.constant:
            console.print(table_of(self.constant))
        if self.changing:
            console.print(slo_table(self.changing, arguments.slo))
        if arguments.plot and self.constant:
            plot(self.constant, arguments.plot)
        if arguments.json:
            arguments.json.write_text(json.dumps(asdict(self), indent=1) + "\n")


async def run(arguments: argparse.Namespace, results: Results, bar: Progress) -> None:
    prompt = prompt_of(arguments.model, arguments.text)
    fixed = fixed_choices(arguments, stored_kv(arguments.model, prompt, arguments.kv, bar), bar)
    codecs = list(dict.fromkeys([*(scheme.codec for scheme in fixed), ADAPTIVE]))
    links = [float(link) for link in arguments.links.split(",") if link]
    async with running(arguments, prompt, codecs) as mesh:
        for scheme in bar.track(fixed, description="storing"):
            await mesh.put(scheme)
        await measure(mesh, fixed, links, arguments.repeats, results.constant, bar)
        if arguments.slo:
            results.changing += await under_weather(mesh, fixed, arguments.slo, arguments.requests, bar)


def main() -> int:
    arguments, results = arguments_of(), Results()
    if reason := problem():
        print(f"skipped: {reason}", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            asyncio.run(run(arguments, results, bar))
    finally:
        results.show(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
