"""The Python clients of a mesh: `AsyncClient`, and its synchronous twin `Client`.

Knows no HTTP, no tokenizer and no retry: recovery is the router's, and an error of `kvmesh.errors` is the answer.
"""

from kvmesh.client.aio import AsyncClient, AsyncStream
from kvmesh.client.events import Choice, Completion, Delta, Finish, ModelInfo, PromptInfo, Timings, Usage, WorkerStatus
from kvmesh.client.requests import Message, Options
from kvmesh.client.sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Completion",
    "Delta",
    "Finish",
    "Message",
    "ModelInfo",
    "Options",
    "PromptInfo",
    "Stream",
    "Timings",
    "Usage",
    "WorkerStatus",
]
