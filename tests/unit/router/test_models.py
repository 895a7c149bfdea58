"""Which models there are, loaded once; and which workers may serve one together."""

import asyncio
import threading

import pytest

from kvmesh.errors import InvalidArgument, NotFound, Unavailable
from kvmesh.registry import StaticDirectory
from kvmesh.types import Role, WorkerInfo
from kvmesh_router.model import FAKE, Model, Models, load
from kvmesh_router.pairing import pair


def worker(name, role=Role.DECODE, model="fake", **layout):
    return WorkerInfo(name, 1, role, "h:1", 1, model, "/".join(f"{k}={v}" for k, v in layout.items()), layout)


async def test_the_only_model_needs_no_name_and_several_do():
    directory = StaticDirectory([worker("a"), worker("b")])
    models = Models(directory, patience=0.01)
    assert (await models.get(None)).name == "fake"
    with pytest.raises(NotFound, match="there is fake"):
        await models.get("other")
    directory.set([worker("a"), worker("c", model="other")])
    with pytest.raises(InvalidArgument, match="fake, other"):
        await models.get(None)


async def test_a_model_stays_known_when_its_workers_go():
    directory = StaticDirectory([worker("a")])
    models = Models(directory, patience=0.01)
    await models.get("fake")
    directory.set([])
    assert (await models.get("fake")).name == "fake"


async def test_nothing_served_is_unavailable_after_waiting():
    directory = StaticDirectory()
    with pytest.raises(Unavailable):
        await Models(directory, patience=0.01).get("fake")
    waiting = asyncio.create_task(Models(directory, patience=5).get("fake"))
    await asyncio.sleep(0)
    directory.set([worker("a")])
    assert (await waiting).name == "fake"


async def test_loads_once_and_again_after_a_failure():
    calls, gate = [], threading.Event()

    def slow(source):
        calls.append(source)
        gate.wait(5)
        if len(calls) == 1:
            raise NotFound("not yet")
        return Model("folder", load(FAKE).tokenizer, 512, frozenset(), 10)

    models = Models(StaticDirectory([worker("a", model="mine")]), load=slow, known={"mine": "/somewhere"})
    first = [asyncio.create_task(models.get("mine")) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    results = await asyncio.gather(*first, return_exceptions=True)
    assert [type(result) for result in results] == [NotFound] * 3
    assert (await models.get("mine")).name == "mine"
    assert calls == ["/somewhere"] * 2


async def test_loads_what_workers_serve_before_anyone_asks(caplog):
    loaded = []

    def load_or_fail(source):
        loaded.append(source)
        if source == "broken":
            raise NotFound("no such file")
        return load(FAKE)

    models = Models(StaticDirectory(), load=load_or_fail, patience=0.01)
    models.prepare([worker("a"), worker("b"), worker("c", model="broken"), worker("s", Role.KVSTORE, model="")])
    await models.get("fake")
    await models.preload("fake")
    async with asyncio.timeout(10):
        while "broken" in models.served():  # noqa: ASYNC110 - its thread has yet to come back
            await asyncio.sleep(0.001)
    assert (await models.get(None)).name == "fake"
    assert sorted(loaded) == ["broken", "fake", "fake"]
    assert "no such file" in caplog.text


def test_pairs_have_equal_fingerprints():
    good, bad = worker("p1", Role.PREFILL, dtype="f32"), worker("p2", Role.PREFILL, dtype="f16")
    decode = [worker("d1", dtype="f32"), worker("d2", dtype="f64"), worker("d3", model="other", dtype="f16")]
    pairing = pair("fake", [good, bad], decode)
    assert (pairing.prefill, pairing.decode, pairing.mismatch) == ((good,), tuple(decode[:2]), "")
    assert pair("fake", [good], decode, decode[1].fingerprint).decode == (decode[1],)
    assert pair("fake", [], decode).mismatch == pair("fake", [bad], []).mismatch == ""


def test_a_mismatch_names_the_fields():
    prefill, decode = worker("p", Role.PREFILL, dtype="f16", rope="a", layers="2"), worker("d", dtype="f32", layers="2")
    assert pair("fake", [prefill], [decode]).mismatch == (
        "p and d must not pair: they differ in dtype (f16, f32), rope (a, none)"
    )
