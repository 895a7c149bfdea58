"""`kvmesh up` and `kvmesh down`: a mesh on this machine that outlives the command."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvmesh.cli.models import fetch
from kvmesh.cli.plan import DEFAULT_PORT, FAKE_MODEL, MeshPlan, model_argument, parse_size
from kvmesh.cli.policy import PlanOption, PolicyOption, policy_settings
from kvmesh.cli.processes import alive
from kvmesh.cli.render import notes
from kvmesh.cli.state import DEFAULT_NAME, MeshState, StateFile
from kvmesh.errors import AlreadyExists, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from kvmesh.cli.launch import Launcher

DEFAULT_MODEL = "smollm2-135m-instruct"
START_TIMEOUT = 300.0
DRAIN_GRACE = 10.0
PROCESS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
"""Threads sleep while they wait for work, and a codec's algebra takes the one it was given: there is one a core."""

MeshModelOption = Annotated[
    str, typer.Option("--model", help=f"A name of `kvmesh models list`, a folder, a .gguf file, or {FAKE_MODEL!r}.")
]
PrefillOption = Annotated[int, typer.Option("--prefill", min=0, help="Prefill services.")]
DecodeOption = Annotated[int, typer.Option("--decode", min=1, help="Decode services.")]
MixedOption = Annotated[int, typer.Option("--mixed", min=0, help="Services that do both, as the policy says.")]
KvstoreOption = Annotated[int, typer.Option("--kvstore", min=0, help="KV stores.")]
KvMemoryOption = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Paged KV of each prefill and decode, such as 512MiB.")
]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bf16", "int8", "int4"] | None,
    typer.Option("--precision", help="float32, bf16, int8, int4 or auto, the fastest of good quality. Default: bf16."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of each prefill and decode. Default: 1.")
]
CodecOption = Annotated[
    str | None,
    typer.Option(
        "--codec",
        help="Of stored KV: raw, int8, fp8, cachegen or cachegen:LEVEL; adaptive is raw or lossy as suits the links."
        " Default: adaptive where the model has a profile, else raw.",
    ),
]
QualityOption = Annotated[
    int | None,
    typer.Option("--quality", min=1, help="The coarsest KV to fetch over a slow link, in quality layers. Default: 2."),
]
TtftSloOption = Annotated[
    float | None,
    typer.Option("--ttft-slo", min=0.001, help="Seconds to the first token: KV is fetched as fine as that allows."),
]
ReplicasOption = Annotated[
    int | None, typer.Option("--replicas", min=1, max=16, help="KV stores that hold each chunk. Default: 1.")
]
NameOption = Annotated[str, typer.Option("--name", help="Tells several meshes on one machine apart.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=1, help="Seconds to become ready in.")]


def up(
    prefill: PrefillOption = 1,
    decode: Annotated[int, typer.Option(min=0, help="Decode services.")] = 1,
    kvstore: KvstoreOption = 1,
    model: MeshModelOption = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The router's port.")] = DEFAULT_PORT,
    redis: Annotated[
        str | None, typer.Option(metavar="URL", help="A Redis or Valkey that runs already. Default: start one.")
    ] = None,
    memory: KvMemoryOption = None,
    store_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory tier of each KV store.")] = None,
    store_disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Disk tier of each KV store.")] = None,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    codec: CodecOption = None,
    quality: QualityOption = None,
    ttft_slo: TtftSloOption = None,
    replicas: ReplicasOption = None,
    mixed: MixedOption = 0,
    policy: PolicyOption = None,
    plan: PlanOption = None,
    name: NameOption = DEFAULT_NAME,
    timeout: TimeoutOption = START_TIMEOUT,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; Ctrl-C stops the mesh.")] = False,
) -> None:
    """Start a mesh on this machine and leave it running."""
    from kvmesh.cli.launch import Launcher

    settings = memory_settings(memory, store_memory, store_disk) | engine_settings(precision, threads)
    settings |= streaming_settings(codec, quality, ttft_slo) | policy_settings(policy, plan, mixed)
    settings |= {"KVMESH_REPLICAS": str(replicas)} if replicas else {}
    settings |= {"KVMESH_DISK_PATH": str(StateFile(name).chunks)} if store_disk else {}
    prefix = f"{socket.gethostname()}-{name}-" if redis else ""
    if not decode + mixed:
        raise InvalidArgument("nobody would generate: give --decode or --mixed at least one")
    mesh = MeshPlan(model_argument(model), prefill, decode, kvstore, port, prefix, settings, mixed)
    file = StateFile(name)
    with file.lock():
        refuse_running(file.load())
        fetch(model)
        launcher = Launcher(mesh, file.logs, file=file, redis_url=redis or "", die_with_parent=foreground)
        state = start_with_progress(launcher, timeout)
    typer.echo(f"kvmesh serves {model} at {state.address} ({len(state.processes)} processes, logs in {file.logs})")
    if foreground:
        _stay(launcher)
    else:
        extra = "" if name == DEFAULT_NAME else f" --name {name}"
        typer.echo(f'Try: kvmesh generate "Hello" · kvmesh chat · kvmesh status · kvmesh down{extra}')


def down(name: NameOption = DEFAULT_NAME) -> None:
    """Stop the mesh that `kvmesh up` started; running requests may finish first."""
    from kvmesh.cli.launch import stop_in_order

    file = StateFile(name)
    with file.lock():
        state = file.load()
        running = [record for record in state.processes if alive(record)] if state else []
        with notes().status(f"stopping {len(running)} processes"):
            stop_in_order(running, DRAIN_GRACE)
        file.delete()
    typer.echo(f"stopped {len(running)} processes" if running else "no mesh is up")


def refuse_running(state: MeshState | None) -> None:
    """A state whose processes are all gone (a reboot, a crash) is no obstacle.

    Raises:
        AlreadyExists: some of the mesh still runs.
    """
    if state and any(map(alive, state.processes)):
        where = f"at {state.address}" if state.address else "but not ready"
        raise AlreadyExists(f"a mesh is already up {where}; `kvmesh down` stops it")


def memory_settings(
    memory: str | None, store_memory: str | None = None, store_disk: str | None = None
) -> dict[str, str]:
    """Sizes as the settings of services.

    Raises:
        InvalidArgument: all sizes that are none.
    """
    sizes = {"KVMESH_KV_MEMORY": memory, "KVMESH_MEMORY_BYTES": store_memory, "KVMESH_DISK_BYTES": store_disk}
    settings: dict[str, str] = {}
    problems = []
    for variable, text in sizes.items():
        try:
            settings |= {variable: str(parse_size(text))} if text is not None else {}
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise InvalidArgument("; ".join(problems))
    return settings


def engine_settings(precision: str | None, threads: int | None) -> dict[str, str]:
    """What was said of the engines, as settings of services; see PROCESS."""
    given = {"KVMESH_PRECISION": precision, "KVMESH_THREADS": None if threads is None else str(threads)}
    settings = {variable: value for variable, value in given.items() if value is not None}
    return settings | PROCESS


def streaming_settings(codec: str | None, quality: int | None, ttft_slo: float | None) -> dict[str, str]:
    """How KV travels, as settings of services."""
    given = {"KVMESH_CODEC": codec, "KVMESH_QUALITY": quality, "KVMESH_TTFT_SLO": ttft_slo}
    return {variable: str(value) for variable, value in given.items() if value is not None}


def start_with_progress(launcher: Launcher, timeout: float) -> MeshState:
    with notes().status("starting the mesh") as spinner:
        return launcher.start(lambda ready, total: spinner.update(f"{ready} of {total} services ready"), timeout)


def _stay(launcher: Launcher) -> None:
    """Until interrupted, or until a process ends of its own."""
    try:
        while (problem := launcher.ended()) is None:
            time.sleep(0.2)
        raise Unavailable(problem)
    finally:
        launcher.stop(DRAIN_GRACE)
