"""Who is alive: registrations with heartbeats, a time to live and epochs, in Redis.

client     Registry: register, list, next epoch
directory  Directory: what was last known, kept when Redis is away
scripts    the transitions in Redis
"""

from kvmesh.registry.client import Registration, Registry, Snapshot
from kvmesh.registry.directory import Directory, StaticDirectory

__all__ = ["Directory", "Registration", "Registry", "Snapshot", "StaticDirectory"]
