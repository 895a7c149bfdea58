"""The life that every process of the mesh has: configure, stand, serve, register, drain, leave.

    config  what each can be told by the environment
    base    telemetry, registry, epoch and identity; serving and registering
    main    the `__main__` of a service: signals and exit statuses

Knows no service.
"""

from kvmesh.process.base import Base, base
from kvmesh.process.config import ProcessConfig, read
from kvmesh.process.main import main, never

__all__ = ["Base", "ProcessConfig", "base", "main", "never", "read"]
