"""From a setting to a codec: `raw`, `int8`, `fp8`, `cachegen` or `cachegen:LEVEL`, and where its profile lies.

What is wrong with a setting or a profile is said here, before anything is served. Compiles what the codec will need, so
call it where a wait is welcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from kvmesh.errors import InvalidArgument, NotFound, Unavailable
from kvmesh.kv.codec import Codec, Raw
from kvmesh.kv.codecs import profile as profiles
from kvmesh.kv.codecs.cachegen import DEFAULT_LEVEL, CacheGen
from kvmesh.kv.codecs.fp8 import Fp8
from kvmesh.kv.codecs.int8 import Int8
from kvmesh.kv.codecs.profile import Profile

NAMES = ("raw", "int8", "fp8", "cachegen")
PROFILE_NAME = "kvmesh-profile.kvp"
"""Of a profile in its model's folder."""


def parse(setting: str) -> tuple[str, int | None]:
    """Name and level of a codec; the level of `cachegen` alone is its default, of others None.

    Raises:
        InvalidArgument: there is no such codec.
    """
    name, colon, level = setting.partition(":")
    if name == "cachegen" and (not colon or (level.isascii() and level.isdigit() and int(level) > 0)):
        return name, int(level or DEFAULT_LEVEL)
    if name not in NAMES or colon:
        raise InvalidArgument(f"the codec {setting!r} is not raw, int8, fp8, cachegen or cachegen:LEVEL")
    return name, None


def check_setting(setting: str) -> str:
    """`setting` itself; raises ValueError where `parse` refuses it."""
    try:
        parse(setting)
    except InvalidArgument as error:
        raise ValueError(str(error)) from error
    return setting


def open_codec(setting: str, shape: Sequence[int], profile: Profile | None = None) -> Codec:
    """The codec, ready to be used without further delay, for KV of (layers, planes, kv_heads, head_dim) `shape`.

    Raises:
        InvalidArgument: no such codec or level, or a profile made for KV of another shape.
        NotFound: it needs a profile and there is none.
        Unavailable: numba is not installed.
    """
    name, level = parse(setting)
    plain: dict[str, Codec] = {"raw": Raw(), "int8": Int8(), "fp8": Fp8()}
    if level is None:
        return plain[name]
    if profile is None:
        raise NotFound(f"the codec {setting} needs a profile of this model: `kvmesh kv calibrate` makes one")
    if profile.shape != tuple(shape):
        raise InvalidArgument(f"the codec profile is of KV of shape {profile.shape}, the model's is {tuple(shape)}")
    codec = CacheGen(profile, level)
    _warm_up(codec)
    return codec


def find_profile(path: Path | None, folder: Path, name: str) -> Profile | None:
    """The profile at `path`, else in the model's folder, else the one that ships for a model of this name.

    Raises:
        InvalidArgument: a file that is no profile.
        NotFound: there is nothing at `path`.
    """
    if path is not None and not path.is_file():
        raise NotFound(f"there is no codec profile {path}")
    for candidate in (path, folder / PROFILE_NAME):
        if candidate is not None and candidate.is_file():
            return profiles.read(candidate)
    shipped = files("kvmesh.kv") / "profiles" / f"{name}.kvp"
    return profiles.parse(shipped.read_bytes()) if shipped.is_file() else None


def _warm_up(codec: CacheGen) -> None:
    layers, planes, heads, dim = codec.profile.shape
    shape = (layers, planes, 16, heads, dim)
    try:
        payload = codec.encode(np.zeros(shape, "<f4"), 0)
        codec.decode(memoryview(payload), shape, np.dtype("<f4"), 0)
    except ModuleNotFoundError as error:
        raise Unavailable(f"cachegen needs the package {error.name!r}: pip install 'kvmesh[decode]'") from error
