"""Other engines on the same model, each in a process of its own. Knows how to ask them, and nothing of kvmesh."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

Figure = tuple[int, float, float]
"""(batch, prefill tokens/s, decode tokens/s)."""

_VLLM = """
import json, random, sys, time
from vllm import LLM, SamplingParams
model, prompt, new, *batches = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM(model, dtype="bfloat16", max_model_len=prompt + new + 16, enable_prefix_caching=False,
          max_num_batched_tokens=max(prompt, 512) + max(batches), max_num_seqs=max(batches))
def seconds(batch, tokens):
    prompts = [{"prompt_token_ids": random.choices(range(100, 40000), k=prompt)} for _ in range(batch)]
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - began
seconds(1, 4)
for batch in batches:
    first = min(seconds(batch, 1) for _ in range(2))
    whole = min(seconds(batch, new + 1) for _ in range(2))
    print("ROW", json.dumps([batch, batch * prompt / first, batch * new / (whole - first)]))
"""


def vllm(python: str, model: Path, prompt: int, new: int, batches: Sequence[int], threads: int) -> list[Figure]:
    """vLLM by its offline interface; decode time is that of new + 1 tokens less that of one."""
    bind = f"0-{threads - 1}" if threads > 1 else "0"
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_CPU_KVCACHE_SPACE": "2"}
    environment.pop("OMP_WAIT_POLICY", None)
    output = _run([python, "-c", _VLLM, str(model), *map(str, (prompt, new, *batches))], environment)
    rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
    return [(batch, prefill, decode) for batch, prefill, decode in rows]


def llama_bench(binary: str, gguf: Path, prompt: int, new: int, batches: Sequence[int], threads: int) -> list[Figure]:
    """llama.cpp by `llama-batched-bench`."""
    context = max(batches) * (prompt + new)
    sizes = ["-npp", str(prompt), "-ntg", str(new), "-npl", ",".join(map(str, batches)), "-c", str(context)]
    command = [binary, "-m", str(gguf), "-t", str(threads), "-b", "2048", "-ub", "512", *sizes]
    output = _run([*command, "--output-format", "jsonl"], dict(os.environ))
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [(row["pl"], row["speed_pp"], row["speed_tg"]) for row in rows]


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Standard output; a peer that fails ends the benchmark with the last lines that it wrote."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return done.stdout
