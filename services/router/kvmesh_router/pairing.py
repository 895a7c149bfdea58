"""Which workers may serve a request together: same model, same layout of KV.

Pure; which of them it is to be is for placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmesh.types import WorkerInfo


@dataclass(frozen=True, slots=True)
class Pairing:
    """Prefill workers that some decode worker matches, decode workers, and why there is no pair (empty if there is)."""

    prefill: tuple[WorkerInfo, ...]
    decode: tuple[WorkerInfo, ...]
    mismatch: str = ""

    @property
    def workers(self) -> list[WorkerInfo]:
        """Each once, whatever it can do."""
        return [*self.prefill, *(worker for worker in self.decode if not worker.role.prefills)]


def pair(model: str, prefill: Iterable[WorkerInfo], decode: Iterable[WorkerInfo], fingerprint: str = "") -> Pairing:
    """With a `fingerprint`, only workers of that one: a request has begun and must go on alike."""
    prefills = [w for w in prefill if w.model == model and fingerprint in ("", w.fingerprint)]
    decodes = [w for w in decode if w.model == model and fingerprint in ("", w.fingerprint)]
    common = {w.fingerprint for w in prefills} & {w.fingerprint for w in decodes}
    paired = tuple(w for w in prefills if w.fingerprint in common)
    return Pairing(paired, tuple(decodes), "" if paired else _mismatch(prefills, decodes))


def _mismatch(prefill: Sequence[WorkerInfo], decode: Sequence[WorkerInfo]) -> str:
    if not prefill or not decode:
        return ""
    one, other = prefill[0], decode[0]
    return f"{one.worker_id} and {other.worker_id} must not pair: they differ in {differences(one, other)}"


def differences(one: WorkerInfo, other: WorkerInfo) -> str:
    """The layout fields that differ, with both values."""
    names = [name for name in sorted({*one.layout, *other.layout}) if one.layout.get(name) != other.layout.get(name)]
    return ", ".join(f"{n} ({one.layout.get(n, 'none')}, {other.layout.get(n, 'none')})" for n in names) or "layout"
