"""The one error tree and the one gRPC status table.

    KvmeshError
    ├── InvalidArgument        INVALID_ARGUMENT     violations: [(field, what is wrong)]
    ├── NotFound               NOT_FOUND
    ├── AlreadyExists          ALREADY_EXISTS
    ├── Overloaded             RESOURCE_EXHAUSTED   retry_after: seconds
    ├── Mismatch               FAILED_PRECONDITION  peers that must not pair
    ├── Unavailable            UNAVAILABLE          another worker may serve
    ├── DeadlineExceeded       DEADLINE_EXCEEDED
    └── Aborted                ABORTED

Anything else that reaches a servicer is a bug and becomes INTERNAL. `kvmesh.rpc.interceptors` applies the table on the
way out, `kvmesh.rpc.stream` reverses it on the way in (both through
`kvmesh.rpc.status`); nobody else translates.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc


class KvmeshError(Exception):
    """Base of all errors that kvmesh raises on purpose; the message is one clear sentence for the user."""

    code = grpc.StatusCode.INTERNAL


class InvalidArgument(KvmeshError):
    """Bad input, every violation named."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str = "", violations: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message or "; ".join(f"{name} {text}" for name, text in violations))
        self.violations = tuple(violations)


class NotFound(KvmeshError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(KvmeshError):
    code = grpc.StatusCode.ALREADY_EXISTS


class Overloaded(KvmeshError):
    """No room; `retry_after` is a hint in seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Mismatch(KvmeshError):
    """Peers of different model or layout; the message says in what they differ."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unavailable(KvmeshError):
    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(KvmeshError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Aborted(KvmeshError):
    code = grpc.StatusCode.ABORTED


STATUS_TO_ERROR: dict[grpc.StatusCode, type[KvmeshError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        Overloaded,
        Mismatch,
        Unavailable,
        DeadlineExceeded,
        Aborted,
    )
}
