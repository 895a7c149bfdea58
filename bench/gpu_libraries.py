"""FlashInfer's compiled libraries: what bench/gpu.py needs built at once, taken from a folder or tar file, kept in one.

    python bench/gpu_libraries.py FOLDER|NAME.tar [--sets llama smollm2 window float8 latent]

Compiles for an H100 (sm_90a; FLASHINFER_CUDA_ARCH_LIST says otherwise) without a device, and keeps the libraries as
VERSION/NAME/NAME.so for `bench/gpu.py --aot`. Knows which libraries FlashInfer 0.6.6 loads on an H100.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

BF16, FP8, INT32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
SETS = ("llama", "smollm2", "window", "float8", "latent")


def specifications(sets: Sequence[str]) -> list[Any]:
    """What is to be built: prompts on FA3; decode and what goes with it on FA2, on CUDA cores a kernel of its own."""
    jit = importlib.import_module("flashinfer.jit.attention.modules")

    def prefill(family: str, head_dim: int, stored: torch.dtype = BF16, window: bool = False) -> Any:
        types = (BF16, stored, BF16, INT32)
        return jit.gen_batch_prefill_module(family, *types, head_dim, head_dim, 0, window, False, False)

    found = [
        importlib.import_module("flashinfer.jit.page").gen_page_module(),
        importlib.import_module("flashinfer.jit.cascade").gen_cascade_module(),
    ]
    if "llama" in sets:
        found += [prefill("fa3", 128), prefill("fa2", 128)]
    if "smollm2" in sets:
        decode = jit.gen_batch_decode_module(BF16, BF16, BF16, INT32, 64, 64, 0, False, False)
        found += [decode, prefill("fa3", 64), prefill("fa2", 64)]
    if "window" in sets:
        found += [prefill("fa3", 128, window=True), prefill("fa2", 128, window=True)]
    if "float8" in sets:
        found.append(prefill("fa2", 128, FP8))
    if "latent" in sets:
        found.append(jit.gen_batch_mla_module("fa3", BF16, BF16, BF16, INT32, 512, 64, False))
    return found


def build(sets: Sequence[str]) -> float:
    """Compiles side by side what is not there yet; seconds."""
    began = time.perf_counter()
    core = importlib.import_module("flashinfer.jit.core")
    core.build_jit_specs(specifications(sets))
    return time.perf_counter() - began


def stand_in_for_the_driver(folder: Path) -> None:
    """An empty libcuda.so for the linker, where no driver is installed; the real one is found when it runs."""
    target = folder / "libcuda.so"
    command = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(target), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    os.environ["LIBRARY_PATH"] = f"{os.environ.get('LIBRARY_PATH', '')}:{folder}".lstrip(":")


def take(flashinfer: Any, libraries: Path) -> None:
    """Puts libraries built ahead where FlashInfer looks first. Raises SystemExit: they are of another version."""
    copy_out(libraries, flashinfer.__version__, importlib.import_module("flashinfer.jit.env").FLASHINFER_AOT_DIR)


def keep(flashinfer: Any, target: Path, sets: Sequence[str]) -> None:
    """Adds those of these sets that were compiled here; they have been built, for of others there may be a part."""
    compiled = (spec.jit_library_path for spec in specifications(sets))
    copy_in((library for library in compiled if library.exists()), flashinfer.__version__, target)


def copy_out(libraries: Path, version: str, target: Path) -> None:
    with unpacked(libraries) as folder:
        if not (folder / version).is_dir():
            raise SystemExit(f"{libraries} holds no libraries of FlashInfer {version}")
        shutil.copytree(folder / version, target, dirs_exist_ok=True)


def copy_in(libraries: Iterable[Path], version: str, target: Path) -> None:
    with unpacked(target) as folder:
        for library in libraries:
            place = folder / version / library.parent.name / library.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, place)
        if folder != target:
            _pack(folder, target)


@contextmanager
def unpacked(libraries: Path) -> Iterator[Path]:
    """The folder itself; what a tar file holds, if it is there, in a temporary one."""
    if libraries.suffix != ".tar":
        yield libraries
        return
    with tempfile.TemporaryDirectory() as folder:
        if libraries.exists():
            with tarfile.open(libraries) as tar:
                tar.extractall(folder, filter="data")
        yield Path(folder)


def _pack(folder: Path, target: Path) -> None:
    """The tar file is whole at any moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w") as tar:
        for version in folder.iterdir():
            tar.add(version, version.name)
    part.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="a folder, or a tar file: NAME.tar")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    arguments = parser.parse_args()
    # FlashInfer reads it when it is imported.
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    flashinfer = importlib.import_module("flashinfer")
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_the_driver(Path(folder))
        print(f"built in {build(arguments.sets):.0f} s")
    keep(flashinfer, arguments.target, arguments.sets)


if __name__ == "__main__":
    main()
