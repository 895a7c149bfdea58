"""What every process can be told, by environment variables of prefix KVMESH_. Constructed by `main` alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

C = TypeVar("C", bound="ProcessConfig")
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "debug", "info", "warning", "error"]


class ProcessConfig(BaseSettings):
    """Common to all services; seconds where nothing else is said."""

    model_config = SettingsConfigDict(
        env_prefix="KVMESH_", frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True
    )

    redis_url: str = "redis://127.0.0.1:6379/0"
    registry_ttl: float = Field(default=5.0, gt=0)
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0: any."""
    advertise: str | None = None
    """Host that others reach this process by; default: `host`."""
    worker_id: str | None = Field(default=None, min_length=1, max_length=128)
    """Stable over restarts; default: role, host name, and port."""
    drain_grace: float = Field(default=10.0, ge=0)
    log_level: Level = "INFO"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """0: any; unset: no metrics."""
    trace_file: Path | None = None
    otlp_endpoint: str | None = Field(
        default=None, validation_alias=AliasChoices("otlp_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT")
    )


def read(config: type[C]) -> C:
    """The config that the environment gives; else says all that is wrong with it and exits with status 2."""
    try:
        return config()
    except ValidationError as error:
        problems = "; ".join(_problem(entry["loc"], entry["msg"]) for entry in error.errors())
        print(f"bad configuration: {problems}", file=sys.stderr)
        raise SystemExit(2) from None


def _problem(location: tuple[int | str, ...], message: str) -> str:
    name = ".".join(map(str, location))
    if not name:
        return message.removeprefix("Value error, ")
    return f"{name if name.isupper() else f'KVMESH_{name.upper()}'}: {message}"
