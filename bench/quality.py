"""What a precision costs in quality: perplexity, and how often greedy decoding agrees with bfloat16.

    python bench/quality.py [--model NAME] [--texts FOLDER] [--precision bf16 int8 ...] [--json FILE]

Perplexity is over `--windows` windows of 512 tokens, spread evenly over the `.txt` files of `--texts`. Agreement is the
share of the first 32 greedy tokens of 50 prompts (64 tokens each, of the same texts) that equal bfloat16's, counted up
to the first that differs and, as `agreement forced`, with bfloat16's own tokens as context: one early tie then costs
one token and not all that follow. The gate: perplexity within 1 % of bfloat16 and a forced agreement of at least 95 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from kvmesh.engine.attention.choice import choose
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.build import resolve_dtype
from kvmesh.engine.forward_choice import forward_of
from kvmesh.engine.linear import PRECISIONS, resolve_precision
from kvmesh.engine.loading import load
from kvmesh.engine.models.llama import Decoder
from kvmesh.engine.runner import kv_layout
from kvmesh.hub import ModelFolder, resolve
from kvmesh.types import BLOCK_TOKENS

WINDOW, PROMPT, NEW = 512, 64, 32
REFERENCE = "bf16"
PERPLEXITY_RATIO, AGREEMENT = 1.01, 0.95


@dataclass(frozen=True, slots=True)
class Row:
    precision: str
    tokens: int
    perplexity: float
    perplexity_ratio: float
    agreement_forced: float
    agreement_free: float
    passed: bool


class Model:
    """A loaded model with the attention of this machine, and KV for `sequences` sequences of `WINDOW` tokens."""

    def __init__(self, folder: ModelFolder, precision: str, sequences: int) -> None:
        dtype = resolve_dtype("auto", precision)
        self.decoder: Decoder = load(folder, dtype, precision=resolve_precision(precision, dtype))
        self._per_sequence = WINDOW // BLOCK_TOKENS
        layout = kv_layout(self.decoder)
        back_end = choose(layout, "cpu", torch.get_num_threads())
        _, attention = back_end(layout, sequences * self._per_sequence, self.decoder.windows)
        self._forward = forward_of(self.decoder, attention)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[Sequence[int]], start: int, every: bool) -> Tensor:
        """float32 logits of rows of `tokens` at positions from `start`: of every token, else of each row's last."""
        count = len(tokens[0])
        segments = [Segment(start, count, self._blocks(i)) for i in range(len(tokens))]
        positions = list(range(start, start + count)) * len(tokens)
        hidden = self._forward(list(chain.from_iterable(tokens)), positions, segments)
        return self.decoder.logits(hidden if every else hidden[count - 1 :: count])

    def _blocks(self, sequence: int) -> range:
        return range(sequence * self._per_sequence, (sequence + 1) * self._per_sequence)


def windows_of(texts: Path, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the texts."""
    tokens: list[int] = []
    for file in sorted(texts.glob("*.txt")):
        tokens += tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False).ids
    starts = [(len(tokens) - length) * i // max(1, count - 1) for i in range(count)]
    return [tokens[start : start + length] for start in starts]


def negative_log_likelihood(model: Model, windows: Sequence[Sequence[int]]) -> Iterator[float]:
    """Per window, the mean over its tokens but the first, in nats."""
    for window in windows:
        logits = model.logits([window], 0, every=True)
        yield torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:])).item()


def greedy(model: Model, prompts: Sequence[Sequence[int]], forced: Tensor | None = None) -> Tensor:
    """The `NEW` most probable tokens `[prompts, NEW]`, after its own tokens or after those of `forced`."""
    chosen = [model.logits(prompts, 0, every=False).argmax(dim=-1)]
    for step in range(NEW - 1):
        context = chosen[-1] if forced is None else forced[:, step]
        chosen.append(model.logits(context.unsqueeze(1).tolist(), PROMPT + step, every=False).argmax(dim=-1))
    return torch.stack(chosen, dim=1)


def greedy_by(model: Model, prompts: Sequence[Sequence[int]], batch: int, forced: Tensor | None = None) -> Tensor:
    """As `greedy`, `batch` prompts at a time: some precisions multiply few rows in another way than many."""
    starts = range(0, len(prompts), batch)
    parts = [(prompts[i : i + batch], None if forced is None else forced[i : i + batch]) for i in starts]
    return torch.cat([greedy(model, part, context) for part, context in parts])


def agreement_free(tokens: Tensor, reference: Tensor) -> float:
    """Share of tokens before the first that differs."""
    return (tokens == reference).long().cumprod(dim=1).double().mean().item()


def measure(args: argparse.Namespace) -> list[Row]:
    folder = resolve(args.model)
    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path))
    windows = windows_of(args.texts, tokenizer, args.windows, WINDOW)
    prompts = windows_of(args.texts, tokenizer, args.prompts, PROMPT)
    precisions = [REFERENCE, *(name for name in args.precision if name != REFERENCE)]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("quality", total=len(precisions) * (len(windows) + 8))
        reference = torch.empty(0)
        for precision in precisions:
            progress.update(task, description=precision)
            model = Model(folder, precision, args.batch)
            losses = []
            for loss in negative_log_likelihood(model, windows):
                losses.append(loss)
                progress.advance(task)
            tokens = greedy_by(model, prompts, args.batch)
            reference = tokens if precision == REFERENCE else reference
            forced = tokens if precision == REFERENCE else greedy_by(model, prompts, args.batch, reference)
            perplexity = math.exp(sum(losses) / len(losses))
            ratio = perplexity / (rows[0].perplexity if rows else perplexity)
            matched = (forced == reference).double().mean().item()
            passed = ratio <= PERPLEXITY_RATIO and matched >= AGREEMENT
            free = agreement_free(tokens, reference)
            rows.append(Row(precision, len(losses) * (WINDOW - 1), perplexity, ratio, matched, free, passed))
            progress.advance(task, 8)
            del model
            gc.collect()
    return rows


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"Quality against {REFERENCE}")
    for column in ("precision", "tokens", "perplexity", "ratio", "agreement forced", "agreement free", "gate"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for row in rows:
        table.add_row(
            row.precision,
            f"{row.tokens:,}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity_ratio:.4f}",
            f"{row.agreement_forced:.1%}",
            f"{row.agreement_free:.1%}",
            "passed" if row.passed else "failed",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a folder or a GGUF file")
    parser.add_argument("--texts", type=Path, default=Path("../shared/texts/evaluation"), help="folder of .txt files")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens for perplexity (default 16)")
    parser.add_argument("--prompts", type=int, default=50, help="prompts for agreement (default 50)")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded together (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
