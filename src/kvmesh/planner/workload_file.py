"""Reads a workload: lengths of requests from CSV, or YAML with a rate, lengths and SLOs. Every fault is named at once.

name: chat
rate: 4.5                                   # requests a second; may be left out
lengths: {input_tokens: 1155, output_tokens: 211, input_cv: 0.9, output_cv: 1.1}      # or trace: FILE.csv
slo: {ttft_seconds: 1.0, tpot_seconds: 0.05, attainment: 0.9}
"""

from __future__ import annotations

import csv
from math import log
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated

from pydantic import Field

from kvmesh.errors import InvalidArgument
from kvmesh.planner.cluster_file import Name, Positive, Section, load_yaml, validated
from kvmesh.planner.world import Slo, Workload

SAMPLES = 1000
SEED = 0
COLUMNS = (
    ("input_tokens", "output_tokens"),
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
)
"""Of lengths: ours, those of the Azure traces, and those of Sarathi-Serve's ShareGPT and Vidur's arXiv."""

Lengths = tuple[tuple[int, int], ...]


class LengthsSection(Section):
    """Means, and coefficients of variation of log-normal distributions."""

    input_tokens: Positive
    output_tokens: Positive
    input_cv: Annotated[float, Field(ge=0)] = 0.0
    output_cv: Annotated[float, Field(ge=0)] = 0.0

    def sample(self) -> Lengths:
        random = Random(SEED)
        draws = ((self.input_tokens, self.input_cv), (self.output_tokens, self.output_cv))
        return tuple(
            (max(1, round(_log_normal(random, *draws[0]))), max(1, round(_log_normal(random, *draws[1]))))
            for _ in range(SAMPLES)
        )


class SloSection(Section):
    ttft_seconds: Positive
    tpot_seconds: Positive
    attainment: Annotated[float, Field(gt=0, lt=1)] = 0.9

    def slo(self) -> Slo:
        return Slo(self.ttft_seconds, self.tpot_seconds, self.attainment)


class WorkloadSection(Section):
    name: Name
    rate: Positive | None = None
    lengths: LengthsSection | None = None
    trace: str | None = None
    slo: SloSection | None = None


def read_workload(path: Path) -> Workload:
    """From YAML; a trace is looked for beside the file."""
    section = validated(WorkloadSection, load_yaml(path), str(path))
    if (section.lengths is None) == (section.trace is None):
        raise InvalidArgument(f"{path} must have either lengths or a trace")
    lengths = section.lengths.sample() if section.lengths else read_lengths(path.parent / str(section.trace))
    inputs, outputs = (fmean(column) for column in zip(*lengths, strict=True))
    slo = section.slo.slo() if section.slo else None
    return Workload(section.name, inputs, outputs, lengths, section.rate, slo)


def read_lengths_as_workload(path: Path) -> Workload:
    """From CSV: requests and nothing else."""
    lengths = read_lengths(path)
    inputs, outputs = (fmean(column) for column in zip(*lengths, strict=True))
    if min(inputs, outputs) <= 0:
        raise InvalidArgument(f"{path} has a mean of {inputs:g} input and {outputs:g} output tokens; both must be > 0")
    return Workload(path.stem, inputs, outputs, lengths)


def read_lengths(path: Path) -> Lengths:
    """(input, output) of each request; columns input_tokens and output_tokens, or those of public traces."""
    try:
        with path.open() as file:
            lengths = tuple(_lengths(row) for row in csv.DictReader(file))
    except FileNotFoundError:
        raise InvalidArgument(f"there is no file {path}") from None
    except (KeyError, TypeError, ValueError, UnicodeDecodeError):
        lengths = ()
    if not lengths:
        raise InvalidArgument(f"{path} is not a CSV file with numbers under input_tokens,output_tokens")
    return lengths


def _lengths(row: dict[str, str]) -> tuple[int, int]:
    columns = next((known for known in COLUMNS if known[0] in row), COLUMNS[0])
    first, second = (round(float(row[column])) for column in columns)
    return first, second


def _log_normal(random: Random, mean: float, cv: float) -> float:
    variance = log(1 + cv * cv)
    return random.lognormvariate(log(mean) - variance / 2, variance**0.5)
