"""Fits power profiles to Splitwise's table of measured runs, and says how far off they are on runs held out.

The table (Mutinifni/splitwise-sim, MIT) has power on the A100 only. Its peak belongs to the prompt, its average to the
token steps; the averages of single prompts beyond 2,048 tokens are left out: they fall where power cannot have fallen.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from kvmesh.planner.power.profile import Curve

MEASURED = "a100-80gb"
MACHINES = {"a100-80gb": ("A100-80G", 400, 1410), "h100-80gb": ("H100-80G", 700, 1980)}
"""Name, TDP in watts and highest clock in MHz of the SXM modules (NVIDIA's data sheets)."""
IDLE = 0.155
"""Share of TDP that an A100 draws with a model loaded and nothing to do: 62 of 400 W, as users report it."""
FOLDS = 5
LONGEST_AVERAGED = 2048


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run: a batch of equal prompts, and the steps after it. Power as a share of TDP; 0 is unmeasured."""

    model: str
    hardware: str
    tensor_parallel: int
    prompt: int
    batch: int
    peak: float
    average: float
    prompt_ms: float
    step_ms: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Curves of one (hardware, model, tensor-parallel degree), with the mean error of 5-fold cross-validation: each
    fold holds out a fifth of the settings, all their repetitions together. Errors are relative."""

    prefill: Curve
    decode: Curve
    prefill_error: float
    decode_error: float


def read_runs(path: Path) -> list[Run]:
    with path.open() as file:
        return [_run(row) for row in csv.DictReader(file)]


def _run(row: dict[str, str]) -> Run:
    sizes = (int(row[key]) for key in ("tensor_parallel", "prompt_size", "batch_size"))
    values = (float(row[key]) for key in ("peak_power", "average_power", "prompt_time", "token_time"))
    return Run(row["model"], row["hardware"], *sizes, *values)


def fit(runs: Sequence[Run]) -> Fit:
    """Of runs that share hardware, model and degree; those without power are left out."""
    prompts = _settings((run.prompt * run.batch, run.peak) for run in runs if run.peak)
    steps = _settings((run.batch, run.average) for run in runs if run.average and run.prompt <= LONGEST_AVERAGED)
    return Fit(_rising(prompts), _flat(steps), _held_out(prompts, _rising), _held_out(steps, _flat))


def entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The document of `data/power/profiles.json`. H100 runs have times and no power: theirs is the A100's share."""
    by_kind: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        by_kind.setdefault((run.hardware, run.model, run.tensor_parallel), []).append(run)
    measured = {(model, degree): kind for (hardware, model, degree), kind in by_kind.items() if hardware == MEASURED}
    return [
        _entry(hardware, kind, fit(measured[model, degree]))
        for (hardware, model, degree), kind in sorted(by_kind.items())
        if hardware in MACHINES
    ]


def _entry(hardware: str, kind: Sequence[Run], found: Fit) -> dict[str, Any]:
    accelerator, watts, clock = MACHINES[hardware]
    run = kind[0]
    prompts = points((run.prompt, run.prompt_ms) for run in kind if run.batch == 1)
    steps = points((run.batch, run.step_ms) for run in kind if run.prompt <= LONGEST_AVERAGED)
    curves = {"prefill": found.prefill, "decode": found.decode}
    return {
        "name": f"{accelerator}/{run.model}/{run.tensor_parallel}",
        "accelerators": run.tensor_parallel,
        "tdp_watts": watts,
        "clock_mhz": clock,
        "idle": IDLE,
        **{key: [round(value, 4) for value in (c.first, c.doubling, c.ceiling)] for key, c in curves.items()},
        "prompt_ms": [[x, round(y, 2)] for x, y in prompts],
        "step_ms": [[x, round(y, 2)] for x, y in steps],
        "origin": "splitwise-sim" if hardware == MEASURED else "splitwise-sim; power: the A100's shares, assumed",
    }


def points(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The median for each x, sorted by x."""
    gathered: dict[float, list[float]] = {}
    for x, y in pairs:
        gathered.setdefault(x, []).append(y)
    return [(x, median(values)) for x, values in sorted(gathered.items())]


def _settings(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Repetitions of a setting report the same power: each is counted once."""
    return sorted(set(pairs))


def _rising(samples: Sequence[tuple[float, float]]) -> Curve:
    """Least squares of a line in log2 x up to a ceiling, over every place where the ceiling may begin."""
    levels = sorted({x for x, _ in samples})
    candidates = [_hinged(samples, knee) for knee in levels[1:]]
    return min(candidates, key=lambda curve: sum((curve(x) - y) ** 2 for x, y in samples))


def _hinged(samples: Sequence[tuple[float, float]], knee: float) -> Curve:
    below = [(x, y) for x, y in samples if x <= knee]
    above = [y for x, y in samples if x >= knee]
    line = _flat(below)
    return Curve(line.first, max(line.doubling, 0.0), fmean(above))


def _flat(samples: Sequence[tuple[float, float]]) -> Curve:
    """Least squares in log2 x, without a ceiling of its own."""
    x, y = np.array(samples).T
    doubling, first = np.polyfit(np.log2(x), y, 1) if len(set(x)) > 1 else (0.0, y.mean())
    return Curve(float(first), float(doubling), 2.0)


def _held_out(samples: Sequence[tuple[float, float]], fitted: Callable[[Any], Curve]) -> float:
    order = np.random.default_rng(0).permutation(len(samples))
    errors: list[float] = []
    for fold in range(FOLDS):
        test = {int(i) for i in order[fold::FOLDS]}
        curve = fitted([sample for i, sample in enumerate(samples) if i not in test])
        errors += [abs(curve(samples[i][0]) / samples[i][1] - 1) for i in test]
    return fmean(errors)
