"""Makes a codec profile: runs a model over texts and learns how its KV is distributed.

    python -m kvmesh.worker.calibration MODEL DIR --output FILE

`kvmesh kv calibrate` starts it in a process of its own, because it loads the engine. Knows no mesh.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from kvmesh.engine.api import KvArray
from kvmesh.engine.batch import Batch, Row, Runner
from kvmesh.errors import InvalidArgument, KvmeshError
from kvmesh.hub import ModelFolder
from kvmesh.kv.codecs.calibration import ABLATIONS, LEVELS, calibrate
from kvmesh.kv.codecs.choice import PROFILE_NAME
from kvmesh.kv.codecs.profile import Profile
from kvmesh.types import BLOCK_TOKENS

CONTEXTS = 12
TOKENS = 2048
_STEP = 512
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


def compute(runner: Runner, passage: Sequence[int]) -> KvArray:
    """KV of a text from its start, in half precision to save memory: it is only counted."""
    blocks = range(-(-len(passage) // BLOCK_TOKENS))
    for start in range(0, len(passage), _STEP):
        runner.run(Batch((Row(passage[start : start + _STEP], start, blocks),)))
    return runner.read_kv(blocks, 0, len(passage)).astype(np.float16)


def make_profile(folder: ModelFolder, passages: Sequence[Sequence[int]], ablations: bool, bar: Progress) -> Profile:
    """The profile of what the model computes for `passages`, in float32."""
    from kvmesh.engine.build import build_runner

    runner = build_runner(folder, "float32", blocks=-(-len(passages[0]) // BLOCK_TOKENS))
    samples = [compute(runner, passage) for passage in bar.track(passages, description="running the model")]
    recipes = (*LEVELS, *(ABLATIONS if ablations else ()))
    task = bar.add_task("learning distributions", total=len(recipes))
    revision = bytes.fromhex(folder.revision)
    return calibrate(samples, revision, recipes, lambda done, total: bar.update(task, completed=done))


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
