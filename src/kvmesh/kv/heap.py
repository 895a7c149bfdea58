"""Telling the C allocator that frames of 1 MiB come and go all the time.

glibc would map and unmap each of them, and the kernel clear its pages every time: that is half of what moving a chunk
costs. Knows glibc only; elsewhere it does nothing. For a `__main__` to call: it holds for the whole process.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_FRAME_ROOM = 2 << 20
_KEPT = 128 << 20


def keep_freed_frames() -> bool:
    """Buffers below 2 MiB are reused, larger ones go back to the system at once. False: there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _FRAME_ROOM), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, 16 << 20))
    return all(mallopt(name, value) for name, value in settings)
