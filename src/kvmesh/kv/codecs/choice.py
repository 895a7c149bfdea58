"""From a setting to a codec: a name of PLAIN, or one of LEVELLED with or without `:LEVEL`; and where its profile lies.

`adaptive` is raw or a lossy codec, chunk by chunk; `auto` is adaptive where there is a profile, else raw.

What is wrong with a setting or a profile is said here, before anything is served. Compiles what the codec will need, so
call it where a wait is welcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

import numpy as np

from kvmesh.errors import InvalidArgument, NotFound, Unavailable
from kvmesh.kv.codec import CACHEGEN, INT8, TRANSFORM, Codec, Raw
from kvmesh.kv.codecs import profile as profiles
from kvmesh.kv.codecs.adaptive import Adaptive, Later
from kvmesh.kv.codecs.cachegen import DEFAULT_LEVEL, CacheGen
from kvmesh.kv.codecs.fp8 import Fp8
from kvmesh.kv.codecs.int8 import Int8
from kvmesh.kv.codecs.lossless import Lossless
from kvmesh.kv.codecs.profile import Profile
from kvmesh.kv.codecs.transform import Transform

PLAIN: Mapping[str, Callable[[], Codec]] = MappingProxyType(
    {"raw": Raw, "int8": Int8, "fp8": Fp8, "lossless": Lossless}
)
"""Those that know no model."""
LEVELLED: Mapping[str, Callable[[Profile, int | None], Codec]] = MappingProxyType(
    {"cachegen": lambda profile, level: CacheGen(profile, level or DEFAULT_LEVEL), "transform": Transform}
)
"""Those that need a profile, and have levels."""
CHOOSING = ("adaptive", "auto")
PROFILE_NAME = "kvmesh-profile.kvp"
"""Of a profile in its model's folder."""


def parse(setting: str) -> tuple[str, int | None]:
    """Name and level of a codec; None is its default level, or none at all.

    Raises:
        InvalidArgument: there is no such codec.
    """
    name, colon, level = setting.partition(":")
    if name in LEVELLED and not colon:
        return name, None
    if name in LEVELLED and level.isascii() and level.isdigit() and int(level) > 0:
        return name, int(level)
    if name not in (*PLAIN, *CHOOSING) or colon:
        names = ", ".join((*PLAIN, *CHOOSING, *LEVELLED, *(f"{name}:LEVEL" for name in LEVELLED)))
        raise InvalidArgument(f"the codec {setting!r} is none of {names}")
    return name, None


def check_setting(setting: str) -> str:
    """`setting` itself; raises ValueError where `parse` refuses it."""
    try:
        parse(setting)
    except InvalidArgument as error:
        raise ValueError(str(error)) from error
    return setting


def open_codec(
    setting: str,
    shape: Sequence[int],
    profile: Profile | None = None,
    *,
    warm: bool = True,
    device: str | None = None,
) -> Codec:
    """The codec for KV of (layers, planes, kv_heads, head_dim) `shape`; if `warm`, ready without further delay.

    Not `warm`, only an adaptive one starts sooner: its members are made when they are first used.
    `device`: the torch device that does the arithmetic of those with levels; None: numpy does, without torch.

    Raises:
        InvalidArgument: no such codec or level, or a profile made for KV of another shape.
        NotFound: it needs a profile and there is none.
        Unavailable: numba is not installed.
    """
    if setting == "auto":
        usable = profile is not None and profile.shape == tuple(shape)
        return open_codec("adaptive", shape, profile, warm=warm, device=device) if usable else Raw()
    if setting == "adaptive":
        lossy = (INT8, CACHEGEN, TRANSFORM) if profile and profile.transform else (INT8, CACHEGEN)
        makers = [(format, partial(open_codec, format.name, shape, profile, device=device)) for format in lossy]
        members = [make() if warm else Later(format, format.name, make) for format, make in makers]
        return Adaptive((Raw(), *members), profile.hash.hex() if profile else "")
    name, level = parse(setting)
    if name in PLAIN:
        return PLAIN[name]()
    if profile is None:
        raise NotFound(f"the codec {setting} needs a profile of this model: `kvmesh kv calibrate` makes one")
    if profile.shape != tuple(shape):
        raise InvalidArgument(f"the codec profile is of KV of shape {profile.shape}, the model's is {tuple(shape)}")
    codec = _placed(LEVELLED[name](profile, level), device)
    _warm_up(codec, profile)
    return codec


def _placed(codec: Codec, device: str | None) -> Codec:
    if device is None:
        return codec
    from kvmesh.kv.cuda.placement import place  # It imports torch.

    return place(codec, device)


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


def _warm_up(codec: Codec, profile: Profile) -> None:
    layers, planes, heads, dim = profile.shape
    shape = (layers, planes, 16, heads, dim)
    try:
        parts = codec.encode(np.zeros(shape, "<f4"), 0)
        codec.decode([memoryview(part) for part in parts], shape, np.dtype("<f4"), 0)
    except ModuleNotFoundError as error:
        raise Unavailable(f"the codec needs the package {error.name!r}: pip install 'kvmesh[decode]'") from error
