"""Makes a codec profile: runs a model over texts and learns how its KV is distributed.

    python -m kvmesh.worker.calibration MODEL DIR --output FILE

`kvmesh kv calibrate` starts it in a process of its own, because it loads the engine. Knows no mesh.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from kvmesh.engine.api import KvArray
from kvmesh.errors import InvalidArgument, KvmeshError
from kvmesh.hub import ModelFolder
from kvmesh.kv.codecs.calibration import ABLATIONS, LEVELS, calibrate
from kvmesh.kv.codecs.choice import PROFILE_NAME
from kvmesh.kv.codecs.profile import Profile
from kvmesh.kv.codecs.rotary import Rotary
from kvmesh.kv.codecs.transform_calibration import Statistics, learn

CONTEXTS = 25
TOKENS = 2048
_HELD_OUT = 5
"""One passage in so many is kept from the transform, so that it is not judged by what it was made of."""
_STRIDE = 97
_SUFFIXES = (".txt", ".md", ".rst")


def contexts(folder: ModelFolder, texts: Path, count: int, tokens: int) -> list[list[int]]:
    """`count` passages of `tokens` tokens, taken in turn from the files of a folder, their beginnings first.

    Raises:
        InvalidArgument: there is not one passage of that length.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path))
    files = sorted(path for path in texts.iterdir() if path.suffix in _SUFFIXES)
    encoded = [tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids for path in files]
    starts = range(0, max(map(len, encoded), default=0), tokens)
    passages = [ids[start : start + tokens] for start in starts for ids in encoded if start + tokens <= len(ids)]
    if not passages:
        raise InvalidArgument(f"no {' or '.join(_SUFFIXES)} file in {texts} has {tokens} tokens")
    return passages[:count]


def with_copy(passage: Sequence[int], offset: int) -> list[int]:
    """The passage, its last quarter replaced by tokens from `offset` on: texts repeat themselves, models read back."""
    quarter = len(passage) // 4
    return [*passage[: 3 * quarter], *passage[offset : offset + quarter]]


def make_profile(folder: ModelFolder, passages: Sequence[Sequence[int]], ablations: bool, bar: Progress) -> Profile:
    """The profile of what the model computes for `passages`, in float32; one in five tells how coefficients spread."""
    from kvmesh.engine.sensitivity import Sensitivity

    if len(passages) < 2:
        raise InvalidArgument("a transform takes two passages at least")
    model, samples = Sensitivity(folder), []
    statistics: Statistics | None = None
    for number, passage in enumerate(bar.track(passages, description="running the model")):
        kv, gradients = model.compute(with_copy(passage, number * _STRIDE % (len(passage) // 4)), number)
        samples.append(kv.astype(np.float16))
        statistics = statistics or Statistics(_shape(kv), Rotary(*model.rotary))
        if number % _HELD_OUT:
            statistics.add(kv)
            statistics.judge(gradients)
    recipes = (*LEVELS, *(ABLATIONS if ablations else ()))
    task = bar.add_task("learning distributions", total=len(recipes))
    revision = bytes.fromhex(folder.revision)
    learnt = calibrate(samples, revision, recipes, lambda done, total: bar.update(task, completed=done))
    task = bar.add_task("learning a transform")
    assert statistics is not None
    held_out = [sample.astype(np.float32) for sample in samples[::_HELD_OUT]]
    transform = learn(statistics, held_out, report=lambda done, total: bar.update(task, completed=done, total=total))
    return replace(learnt, transform=transform)


def _shape(kv: KvArray) -> tuple[int, int, int, int]:
    layers, planes, _, heads, dim = kv.shape
    return layers, planes, heads, dim


def save(profile: Profile, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(profile.data)
    temporary.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, help="default: in the model's folder, where workers look for it")
    parser.add_argument("--contexts", type=int, default=CONTEXTS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--ablations", action="store_true")
    return parser.parse_args()


def _lines() -> Iterator[str]:
    from kvmesh.hub import resolve

    arguments = _arguments()
    folder = resolve(arguments.model)
    passages = contexts(folder, arguments.texts, arguments.contexts, arguments.tokens)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        profile = make_profile(folder, passages, arguments.ablations, bar)
    path = arguments.output or folder.path / PROFILE_NAME
    save(profile, path)
    yield f"{len(profile.levels)} levels from {len(passages)} contexts of {arguments.tokens} tokens"
    yield f"{path}: {len(profile.data)} bytes, hash {profile.hash.hex()}"


def main() -> int:
    """Exit status."""
    try:
        for line in _lines():
            print(line)
    except (KvmeshError, OSError) as error:
        print(f"kvmesh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
