"""`kvmesh kv stat|ls|verify|evict`: the stores of a mesh, for operators. Found through the registry, asked directly."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.progress import Progress

from kvmesh.cli import store_tables
from kvmesh.cli.processes import alive
from kvmesh.cli.render import notes, print_whole
from kvmesh.cli.state import StateFile
from kvmesh.cli.talk import JsonOption
from kvmesh.errors import InvalidArgument, KvmeshError, NotFound
from kvmesh.loop import run
from kvmesh.types import Role

if TYPE_CHECKING:
    from kvmesh.kv.admin import Filter, StoreAdmin

REDIS_VARIABLE = "KVMESH_REDIS_URL"
DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
KEY_DIGITS = 64
T = TypeVar("T")

RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        help=f"The mesh's Redis. Default: that of the mesh that `kvmesh up` started here, else ${REDIS_VARIABLE}, "
        f"else {DEFAULT_REDIS}.",
    ),
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", metavar="HEX", help="Chunks whose fingerprint begins so.")
]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", metavar="HEX", help='Chunks of one tenant, as `kv stat` names it; "-": none.')
]
PrefixOption = Annotated[str | None, typer.Option("--prefix", metavar="HEX", help="Chunks whose key begins so.")]


def stat(redis: RedisOption = None, json: JsonOption = False) -> None:
    """Show what each store holds, tier by tier: chunks, hits, admissions, evictions, bytes saved, tenants."""
    tiers = _ask(redis, lambda admin: admin.tiers())
    if json:
        typer.echo(store_tables.stat_json(tiers))
        return
    print_whole(store_tables.tiers_table(tiers))
    typer.echo(store_tables.savings(tiers))
    if any(reading.tenants for reading in tiers.values()):
        print_whole(store_tables.tenants_table(tiers))


def ls(
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    prefix: PrefixOption = None,
    tenant: TenantOption = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many of each store; 0: all.")] = 50,
    json: JsonOption = False,
) -> None:
    """List stored chunks, the first to go first."""
    chosen = _filter((), namespace, tenant, prefix)
    chunks = _ask(redis, lambda admin: admin.chunks(chosen, limit))
    if json:
        typer.echo(store_tables.chunks_json(chunks))
    else:
        print_whole(store_tables.chunks_table(chunks))


def verify(redis: RedisOption = None, namespace: NamespaceOption = None, json: JsonOption = False) -> None:
    """Read every stored chunk and check its header and checksums; damaged ones are dropped, and the command fails."""
    with Progress(console=notes(), transient=True) as progress:
        bars = {}

        def report(store: str, done: int, total: int) -> None:
            if store not in bars:
                bars[store] = progress.add_task(store, total=total)
            progress.update(bars[store], completed=done, total=total)

        chosen = _filter((), namespace, None, None)
        results = _ask(redis, lambda admin: admin.verify(chosen, report))
    damaged = [key for _, keys in results.values() for key in keys]
    if json:
        typer.echo(store_tables.verify_json(results))
    else:
        typer.echo(f"verified {sum(count for count, _ in results.values())} chunks in {len(results)} stores")
    if damaged:
        raise KvmeshError(f"{len(damaged)} damaged chunks were dropped: {', '.join(key.hex() for key in damaged)}")


def evict(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys, as `kv ls` prints them.")] = None,
    redis: RedisOption = None,
    namespace: NamespaceOption = None,
    tenant: TenantOption = None,
    all: Annotated[bool, typer.Option("--all", help="Every chunk of the mesh.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Drop stored chunks. Leased ones stay, and so do their prefixes."""
    if all == bool(keys or namespace or tenant):
        raise InvalidArgument("name keys, --namespace, --tenant, or --all and nothing else")
    chosen = _filter(tuple(keys or ()), namespace, tenant, None)
    if not yes:
        typer.confirm("Drop these chunks? They will be computed again when asked for.", abort=True, err=True)
    results = _ask(redis, lambda admin: admin.evict(chosen, all=all))
    if json:
        typer.echo(store_tables.evict_json(results))
        return
    kept = sum(len(result.kept_keys) for result in results.values())
    evicted, size = (sum(getattr(r, name) for r in results.values()) for name in ("evicted", "evicted_bytes"))
    typer.echo(f"evicted {evicted} chunks ({store_tables.size(size)}); {kept} are in use and stay")


def default_redis() -> str:
    """That of the running mesh of this machine, else the environment's, else the usual one."""
    state = StateFile().load()
    if state and state.redis_url and any(map(alive, state.processes)):
        return state.redis_url
    return os.environ.get(REDIS_VARIABLE) or DEFAULT_REDIS


def _ask(redis: str | None, question: Callable[[StoreAdmin], Awaitable[dict[str, T]]]) -> dict[str, T]:
    """The answers of all stores; those that give none are named on standard error.

    Raises:
        NotFound: there is no store.
        Unavailable: the registry cannot be reached.
        KvmeshError: no store answers.
    """

    async def ask() -> dict[str, T]:
        async with _admin(redis or default_redis()) as admin:
            answers = await question(admin)
            for name, why in admin.silent.items():
                notes().print(f"{name} does not answer: {why}")
            if not answers:
                raise KvmeshError("no store answers")
            return answers

    return run(ask())


@asynccontextmanager
async def _admin(redis: str) -> AsyncIterator[StoreAdmin]:
    from kvmesh.kv.admin import StoreAdmin
    from kvmesh.registry import Registry
    from kvmesh.rpc.channel import ChannelPool

    registry = Registry(redis)
    try:
        stores = [info for info in await registry.list() if info.role is Role.KVSTORE]
    finally:
        await registry.close()
    if not stores:
        raise NotFound(f"no kvstore is registered at {redis}")
    async with ChannelPool() as channels:
        yield StoreAdmin(channels, stores)


def _filter(keys: tuple[str, ...], namespace: str | None, tenant: str | None, prefix: str | None) -> Filter:
    from kvmesh.kv.admin import Filter

    names = {"a key": keys, "a tenant": (tenant,) if tenant not in (None, "-") else ()}
    digits = {"a key": KEY_DIGITS, "a tenant": KEY_DIGITS // 2}
    for what, texts in names.items():
        for text in texts:
            if len(text or "") != digits[what] or not _hexadecimal(text or ""):
                raise InvalidArgument(f"{text!r} is not {what}: {digits[what]} hexadecimal digits")
    return Filter(
        keys=[bytes.fromhex(key) for key in keys],
        key_prefix=prefix or "",
        fingerprint_prefix=namespace or "",
        tenant=None if tenant is None else bytes.fromhex(tenant.removeprefix("-")),
    )


def _hexadecimal(text: str) -> bool:
    return set(text.lower()) <= set("0123456789abcdef")
