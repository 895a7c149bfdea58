"""What codecs of KV cost and spoil, judged by the model itself.

    python bench/codec.py --texts DIR --profile FILE --json FILE [--contexts 40] [--codecs raw,transform]

For each context, the KV of its first tokens is encoded and decoded in chunks of 256 tokens by every codec, but for the
first `--sink` and last `--window` tokens, which stay exact. Then the model reads on from that KV:

    bits_per_element     of whole bitstreams, headers and side information included; the profile and the first tokens,
                         which lossy codecs keep exact, are apart
    metadata_share       of a chunk's bitstream that is no coded KV
    perplexity_increase  of the true continuation, against exact KV
    kl                   of the next-token distributions along it, from those after exact KV, in nats
    greedy_agreement     leading tokens of a greedy continuation that are those after exact KV, as a share; of the first
                         `--greedy-contexts`
    copy_delta_nll       of a passage from early in the context, repeated: it must be read out of the decoded KV
    copy_kl              along that passage
    other_…              the same for contexts of `--other`, texts of another domain than the calibration's

A level of `transform` is a prefix of what is stored, computed as a worker does. Speeds are elements per second of CPU
time of one thread.
`lmcache` is CacheGen as LMCache ships it (32/16/16 and 32/16 bins, scaled per token), its bits by an ideal coder
whose tables are free. The JSON is written after every context.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.loading import load
from kvmesh.engine.runner import kv_layout
from kvmesh.hub import resolve
from kvmesh.kv import bitstream
from kvmesh.kv.codec import CACHEGEN, FP8, INT8, INT8_GROUP, TRANSFORM, Codec, Raw
from kvmesh.kv.codecs import profile as profiles
from kvmesh.kv.codecs.cachegen import SINK_TOKENS, CacheGen
from kvmesh.kv.codecs.fp8 import Fp8
from kvmesh.kv.codecs.int8 import Int8
from kvmesh.kv.codecs.lossless import Lossless
from kvmesh.kv.codecs.transform import Transform
from kvmesh.kv.cuda.placement import place
from kvmesh.types import BLOCK_TOKENS, CHUNK_TOKENS
from kvmesh.worker.calibration import contexts

REPEATS = 5
COPY_START, COPY_LEAD = 64, 16
"""Where the passage to copy begins, and how many of its tokens tell the model that it is one."""


@dataclass(frozen=True)
class Decoded:
    """KV as a codec gives it back, and what it took."""

    data: np.ndarray[Any, Any]
    bits: float
    metadata: float
    encode_speed: float | None
    decode_speed: float | None


@dataclass(frozen=True)
class Row:
    codec: str
    level: int | None
    bits_per_element: float
    perplexity_increase: float
    kl: float
    greedy_agreement: float
    copy_delta_nll: float
    copy_kl: float
    other_delta_nll: float | None
    other_kl: float | None
    metadata_share: float
    encode_elements_per_s: float | None
    decode_elements_per_s: float | None


Coder = Callable[[np.ndarray[Any, Any]], Decoded]


class Judge:
    """A model that reads on from given KV. Slot i of `slots` keeps one variant of the context."""

    def __init__(self, model: str, slots: int, context: int, continuation: int) -> None:
        self.folder = resolve(model)
        self._model = load(self.folder, "float32", "cpu")
        shared, self._own = context // BLOCK_TOKENS, -(-continuation // BLOCK_TOKENS)
        self._pool = KvPool(kv_layout(self._model), slots * shared + (slots + 2) * self._own, "cpu")
        self._attention = CpuAttention(self._pool, self._model.windows)
        self._context = context
        self._shared = [list(range(i * shared, (i + 1) * shared)) for i in range(slots)]
        self._spare = slots * shared

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            self._hidden([(part, Segment(start, len(part), self._shared[0]))])
        return self._pool.read(self._shared[0], 0, len(tokens))

    @torch.inference_mode()
    def give(self, slot: int, data: np.ndarray[Any, Any]) -> None:
        self._pool.write(self._shared[slot], 0, data)

    @torch.inference_mode()
    def read_on(self, slot: int, continuations: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-probabilities `[tokens, vocabulary]` along each continuation."""
        rows = [(part, Segment(self._context, len(part), self._table(slot, i))) for i, part in enumerate(continuations)]
        hidden = self._hidden(rows).split([len(part) for part in continuations])
        return [F.log_softmax(self._model.logits(part), dim=-1) for part in hidden]

    @torch.inference_mode()
    def greedy(self, first: int, tokens: int) -> np.ndarray[Any, Any]:
        """What each slot goes on with after `first`: int `[slots, tokens]`; all slots advance together."""
        slots = range(len(self._shared))
        chosen = [[first] for _ in slots]
        for position in range(self._context, self._context + tokens):
            rows = [(chosen[i][-1:], Segment(position, 1, self._table(i, 2 + i))) for i in slots]
            for row, token in zip(chosen, self._model.logits(self._hidden(rows)).argmax(-1).tolist(), strict=True):
                row.append(token)
        return np.array(chosen)[:, 1:]

    def _table(self, slot: int, own: int) -> list[int]:
        start = self._spare + own * self._own
        return self._shared[slot] + list(range(start, start + self._own))

    def _hidden(self, rows: Sequence[tuple[Sequence[int], Segment]]) -> torch.Tensor:
        self._attention.plan([segment for _, segment in rows])
        tokens = torch.tensor([token for part, _ in rows for token in part])
        positions = torch.cat([torch.arange(segment.start, segment.end) for _, segment in rows])
        return self._model.forward(self._model.embed(tokens), positions, self._attention)


def through(codec: Codec) -> Coder:
    """Encoded and decoded as a mesh would."""

    def run(data: np.ndarray[Any, Any]) -> Decoded:
        starts = range(0, data.shape[2], CHUNK_TOKENS)
        pieces = [(np.ascontiguousarray(data[:, :, start : start + CHUNK_TOKENS]), start) for start in starts]
        encoded, encoding = timed(lambda piece: bitstream.encode(piece[0], "float32", 0, codec, piece[1]), pieces)
        decoded, decoding = timed(lambda bits: bitstream.decode(bits, codec).data, encoded)
        kept = sink_bytes(codec, data)
        share, size = metadata(codec, encoded[-1]) / len(encoded[-1]), pieces[0][0].size
        bits = 8 * (sum(map(len, encoded)) - kept) / (data.size - kept // 2)
        return Decoded(np.concatenate(decoded, axis=2), bits, share, size / encoding, size / decoding)

    return run


def sink_bytes(codec: Codec, data: np.ndarray[Any, Any]) -> int:
    """Of the first tokens in half precision."""
    return 2 * SINK_TOKENS * (data.size // data.shape[2]) if isinstance(codec, CacheGen | Transform) else 0


def metadata(codec: Codec, bits: bytes) -> int:
    """Bytes of a later chunk's headers, tables, counts and coder states."""
    header = bitstream.read_header(bits)
    blocks, columns = header.layers * header.planes, header.kv_heads * header.head_dim
    own = {
        INT8.id: 2 * blocks * columns * -(-header.tokens // INT8_GROUP),
        FP8.id: 4 * blocks * header.kv_heads,
        CACHEGEN.id: 24 + 20,
        TRANSFORM.id: 24 + len(header.layer_ends) * (2 * header.planes + 4 + 16 + 4 + 16),
    }
    return header.payload_start + own.get(codec.format.id, 0)


def timed(function: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[list[Any], float]:
    """The results, and the fastest run's seconds of this thread's CPU time."""
    results, times = [], []
    for value in inputs:
        begun = time.thread_time()
        results.append(function(value))
        times.append(time.thread_time() - begun)
    return results, min(times)


def lmcache(data: np.ndarray[Any, Any]) -> Decoded:
    """CacheGen as LMCache ships it; layers 0-9 and 10-… of K, 0-1 and 2-… of V."""
    layers, _, tokens, _, _ = data.shape
    bins = np.full((layers, 2, 1, 1, 1), 16.0)
    bins[:10, 0] = bins[:2, 1] = 32
    half = bins / 2 - 1
    scale = np.maximum(np.abs(data).max(axis=(3, 4), keepdims=True), 1e-12)
    levels = np.rint(data / scale * half)
    symbols = (levels + 16).astype(np.uint8).transpose(0, 1, 3, 4, 2).reshape(-1, tokens)
    bits = 0.0
    for symbol in range(32):
        share = (symbols == symbol).mean(axis=1)
        bits -= float((share * np.log2(np.maximum(share, 1e-12))).mean())
    return Decoded(
        (levels * scale / half).astype(np.float32), bits + 16 / (data.shape[3] * data.shape[4]), 0.0, None, None
    )


def coders(profile: Path, wanted: Sequence[str]) -> dict[tuple[str, int | None], Coder]:
    """By name and level, those whose name begins as `wanted`; exact KV first, everything is compared with it."""
    read = profiles.read(profile)
    chosen: dict[tuple[str, int | None], Coder] = {
        ("raw", None): through(Raw()),
        ("int8", None): through(Int8()),
        ("fp8", None): through(Fp8()),
        ("lossless", None): through(Lossless()),
        ("lmcache", None): lmcache,
    }
    for level, content in enumerate(read.levels, start=1):
        name = f"cachegen, groups of {content.group}" if content.group else "cachegen"
        chosen[name, level] = through(CacheGen(read, level))
    for level in range(1, read.transform.quality_layers + 1 if read.transform else 0):
        chosen["transform", level] = through(place(Transform(read, level), "cpu"))
    named = tuple(wanted) or tuple(name for name, _ in chosen)
    return {key: coder for key, coder in chosen.items() if key[0] == "raw" or key[0].startswith(named)}


def judge(
    judge: Judge,
    chosen: Sequence[Coder],
    tokens: Sequence[int],
    options: argparse.Namespace,
    going_on: bool,
    advance: Callable[[], None],
) -> list[tuple[float, ...]]:
    """For each coder: bits, metadata, ΔNLL, KL, ΔNLL and KL of the copy, speeds and, if `going_on`, agreement."""
    context, continuation = tokens[: options.tokens], tokens[options.tokens :]
    passage = context[COPY_START : COPY_START + options.continuation]
    exact = judge.prefill(context)
    results: list[list[float]] = []
    reference: list[torch.Tensor] = []
    for slot, coder in enumerate(chosen):
        decoded = coder(exact)
        data = decoded.data.copy()
        data[:, :, : options.sink] = exact[:, :, : options.sink]
        data[:, :, options.tokens - options.window :] = exact[:, :, options.tokens - options.window :]
        judge.give(slot, data)
        read = judge.read_on(slot, [continuation, passage])
        reference = reference or read
        results.append([
            decoded.bits,
            decoded.metadata,
            nll(read[0], continuation) - nll(reference[0], continuation),
            divergence(reference[0], read[0]),
            nll(read[1], passage, COPY_LEAD) - nll(reference[1], passage, COPY_LEAD),
            divergence(reference[1][COPY_LEAD:], read[1][COPY_LEAD:]),
            decoded.encode_speed or math.nan,
            decoded.decode_speed or math.nan,
        ])  # fmt: skip
        advance()
    agreed = [math.nan] * len(results)
    if going_on:
        greedy = judge.greedy(continuation[0], options.greedy)
        agreed = [float(np.append(row != greedy[0], True).argmax()) / options.greedy for row in greedy]
    return [(*result, share) for result, share in zip(results, agreed, strict=True)]


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of `other` from `exact`, in nats."""
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def nll(logprobs: torch.Tensor, tokens: Sequence[int], lead: int = 0) -> float:
    """Mean over the tokens after the first `lead` + 1."""
    targets = torch.tensor(tokens[lead + 1 :])[:, None]
    return -float(logprobs[lead:-1].gather(1, targets).mean())


def measure(options: argparse.Namespace) -> Iterator[tuple[list[Row], int]]:
    """After each context: the rows so far, and over how many contexts."""
    torch.set_num_threads(1)
    chosen = coders(options.profile, options.codecs.split(",") if options.codecs else ())
    model = Judge(options.model, len(chosen), options.tokens, options.continuation)
    length = options.tokens + options.continuation
    passages = contexts(model.folder, options.texts, options.contexts, length)
    others = contexts(model.folder, options.other, options.other_contexts, length) if options.other else []
    results: list[list[tuple[float, ...]]] = []
    elsewhere: list[list[tuple[float, ...]]] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("codecs and contexts", total=(len(others) + len(passages)) * len(chosen))
        for passage in (*others, *passages):
            into = elsewhere if len(elsewhere) < len(others) else results
            going_on = into is results and len(results) < options.greedy_contexts
            into.append(judge(model, list(chosen.values()), passage, options, going_on, lambda: bar.advance(task)))
            if results:
                away = list(zip(*elsewhere, strict=True)) or [()] * len(chosen)
                samples = zip(chosen, zip(*results, strict=True), away, strict=True)
                yield [row(*key, same, other) for key, same, other in samples], len(results)


def row(codec: str, level: int | None, same: Sequence[tuple[float, ...]], other: Sequence[tuple[float, ...]]) -> Row:
    bits, side, loss, kl, copy, copy_kl, encode, decode, agreed = zip(*same, strict=True)
    speeds = (statistics.median(speed) if not math.isnan(speed[0]) else None for speed in (encode, decode))
    mean = statistics.fmean
    elsewhere = [mean(column) for column in list(zip(*other, strict=True))[2:4]] or [None, None]
    agreement = mean(share for share in agreed if not math.isnan(share))
    quality = (math.expm1(mean(loss)), mean(kl), agreement, mean(copy), mean(copy_kl), *elsewhere)
    return Row(codec, level, mean(bits), *quality, mean(side), *speeds)


def table(rows: Sequence[Row]) -> Table:
    shown = Table(
        "codec", "level", "bits", "perplexity", "KL", "greedy", "copy ΔNLL", "copy KL", "other ΔNLL", "other KL",
        "meta", "enc M/s", "dec M/s", box=None,
    )  # fmt: skip
    for r in rows:
        speeds = (
            f"{speed / 1e6:.0f}" if speed else "-" for speed in (r.encode_elements_per_s, r.decode_elements_per_s)
        )
        shown.add_row(
            r.codec,
            str(r.level or "-"),
            f"{r.bits_per_element:.3f}",
            f"{r.perplexity_increase:+.2%}",
            f"{r.kl:.4f}",
            f"{r.greedy_agreement:.0%}",
            f"{r.copy_delta_nll:+.4f}",
            f"{r.copy_kl:.4f}",
            "-" if r.other_delta_nll is None else f"{r.other_delta_nll:+.4f}",
            "-" if r.other_kl is None else f"{r.other_kl:.4f}",
            f"{r.metadata_share:.2%}",
            *speeds,
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--codecs", default="", help="names, with commas between them; default: all")
    parser.add_argument("--other", type=Path, help="a folder of texts of another domain")
    parser.add_argument("--other-contexts", type=int, default=8)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--contexts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=2048, help="of a context, a multiple of 256")
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--greedy", type=int, default=64, help="tokens of a greedy continuation")
    parser.add_argument("--greedy-contexts", type=int, default=16, help="contexts that are gone on with greedily")
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    options = parser.parse_args()
    rows: list[Row] = []
    count = 0
    for rows, count in measure(options):
        if options.json:
            settings = {name: str(value) for name, value in vars(options).items()} | {"contexts": count}
            options.json.write_text(
                json.dumps({"settings": settings, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
            )
    print(
        f"{options.model}, {count} contexts of {options.tokens} tokens, {options.sink} + {options.window} of them exact"
    )
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
