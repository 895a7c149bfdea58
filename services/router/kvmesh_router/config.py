"""What the router can be told, by environment variables of prefix KVMESH_, beside what every process can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kvmesh.errors import InvalidArgument
from kvmesh.process import ProcessConfig
from kvmesh.scheduling.policies import DEFAULT, check_name


def _policy(name: str) -> str:
    try:
        return check_name(name)
    except InvalidArgument as error:
        raise ValueError(str(error)) from error


class RouterConfig(ProcessConfig):
    """Seconds where nothing else is said."""

    model: str | None = None
    """Where to load the model from that workers advertise by this name, or by the name of this folder."""
    max_concurrent: int = Field(default=256, ge=1)
    max_queued: int = Field(default=1024, ge=0)
    default_deadline: float = Field(default=120.0, gt=0)
    """For clients that set none."""
    stall_timeout: float = Field(default=5.0, gt=0)
    """Silence that makes a worker lost."""
    client_stall_timeout: float = Field(default=30.0, gt=0)
    """How long a client may not read."""
    worker_patience: float = Field(default=3.0, ge=0)
    """How long to wait for a worker to come when there is none."""
    lease_ttl: float = Field(default=30.0, ge=1)
    replicas: int = Field(default=1, ge=1, le=16)
    """Stores that are to hold each chunk of KV, where there are as many."""
    min_prefill_tokens: int = Field(default=0, ge=0)
    """Shorter prompts are prefilled by the decode worker."""
    policy: Annotated[str, AfterValidator(_policy)] = DEFAULT
    """See `kvmesh.scheduling.policies`."""
    gate: Literal["open", "current", "predicted"] = "predicted"
    """By which load requests that would miss an objective are refused early."""
    ttft_slo: float | None = Field(default=None, gt=0)
    """Seconds until a first token is due: gates and policies aim for it, and KV is fetched as fine as it allows."""
    tpot_slo: float | None = Field(default=None, gt=0)
    """Seconds for each later token."""
    power_budget: float | None = Field(default=None, gt=0)
    """Watts that the workers may draw together, as far as they have meters: near it fewer requests are admitted."""
    plan: Path | None = None
    """What `kvmesh plan --json` wrote: phases and weights of workers. Read again whenever it changes."""
