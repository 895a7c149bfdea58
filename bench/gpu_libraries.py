"""FlashInfer's compiled libraries: all that bench/gpu.py needs built at once, taken from a folder, kept in one.

    python bench/gpu_libraries.py FOLDER [--sets llama smollm2 window float8 latent]

Compiles for an H100 (sm_90a; FLASHINFER_CUDA_ARCH_LIST says otherwise) without a device, and keeps the libraries as
FOLDER/VERSION/NAME/NAME.so for `bench/gpu.py --aot FOLDER`. Knows which libraries FlashInfer 0.6.6 loads on an H100.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BF16, FP8, INT32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
SETS = ("llama", "smollm2", "window", "float8", "latent")


def specifications(sets: Sequence[str]) -> list[Any]:
    """What is to be built: prefill for FA3, decode on tensor cores for FA2, on others a kernel of its own."""
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
        found += [decode, prefill("fa3", 64)]
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


def take(flashinfer: Any, folder: Path) -> None:
    """Puts libraries built ahead where FlashInfer looks first. Raises SystemExit: they are of another version."""
    source = folder / flashinfer.__version__
    if not source.is_dir():
        raise SystemExit(f"{folder} holds no libraries of FlashInfer {flashinfer.__version__}")
    shutil.copytree(source, importlib.import_module("flashinfer.jit.env").FLASHINFER_AOT_DIR, dirs_exist_ok=True)


def keep(flashinfer: Any, folder: Path) -> None:
    """Copies the libraries that were compiled here."""
    for library in importlib.import_module("flashinfer.jit.env").FLASHINFER_JIT_DIR.glob("*/*.so"):
        target = folder / flashinfer.__version__ / library.parent.name / library.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    arguments = parser.parse_args()
    # FlashInfer reads it when it is imported.
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    flashinfer = importlib.import_module("flashinfer")
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_the_driver(Path(folder))
        print(f"built in {build(arguments.sets):.0f} s")
    keep(flashinfer, arguments.folder)


if __name__ == "__main__":
    main()
