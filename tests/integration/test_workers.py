"""Prefill and decode with a real kvstore: wherever the KV came from, the answer is that of one engine alone."""

import asyncio
from dataclasses import replace

import pytest

from kvmesh.errors import AlreadyExists, InvalidArgument, Mismatch, Overloaded
from kvmesh.types import Role
from tests.integration.calls import FINGERPRINT, GREEDY, Calls, prompt, undisturbed
from tests.integration.mesh import Mesh

SEEDED = replace(GREEDY, temperature=1.0, seed=11, n=3)


@pytest.mark.parametrize("tokens", [1, 15, 16, 255, 256, 257, 512, 700, 2000])
async def test_kv_travels_from_prefill_to_decode(mesh: Mesh, calls: Calls, tokens: int) -> None:
    text = prompt(tokens)
    ticket = calls.ticket(text)
    first = await calls.prefill(text, ticket)
    assert first.order[0] == "progress"
    assert [kind for kind in first.order if kind != "progress"] == ["first_tokens", "published"]
    assert (first.published.chunks, first.published.reason) == (len(ticket.chunks), "")
    assert (await mesh.statistics("kvstore-0")).leases == 1
    rest = await calls.decode(text, [first.first], ticket)
    assert rest.order[0] == ["started", "samples"]
    assert (rest.started.fetched_tokens, rest.started.recomputed_tokens) == (tokens, 0)
    assert rest.started.recompute_reason == ""
    assert [rest.tokens[0]] == undisturbed(text)
    assert rest.finished == {0: 2}


async def test_three_samples_share_one_prompt(calls: Calls) -> None:
    text = prompt(700)
    ticket = calls.ticket(text)
    first = await calls.prefill(text, ticket, SEEDED)
    assert len(first.first) == 3
    rest = await calls.decode(text, [[token] for token in first.first], ticket, SEEDED)
    assert [rest.tokens[index] for index in range(3)] == undisturbed(text, SEEDED)
    assert rest.started.fetched_tokens == 700


async def test_a_local_prefix_is_neither_computed_nor_published_again(mesh: Mesh, calls: Calls) -> None:
    text = prompt(700)
    await calls.decode(text, [(await calls.prefill(text, one := calls.ticket(text))).first], one)
    chunks = (await mesh.statistics("kvstore-0")).chunks
    again = calls.ticket(text)
    first = await calls.prefill(text, again)
    assert (first.info.local_tokens, first.info.stored_tokens) == (688, 0)
    assert first.published.chunks == len(again.chunks)
    rest = await calls.decode(text, [first.first], again)
    assert rest.started.local_tokens >= 688
    assert [rest.tokens[0]] == undisturbed(text)
    await mesh.until("kvstore-0", lambda statistics: statistics.chunks == chunks)


async def test_a_prefix_that_another_worker_stored_is_fetched() -> None:
    async with Mesh(prefill=2) as mesh:
        ours, theirs = Calls(mesh), Calls(mesh, prefill="prefill-1")
        text = prompt(600)
        longer = text + prompt(300, salt=3)
        await ours.decode(text, [(await ours.prefill(text, ticket := ours.ticket(text))).first], ticket)
        ticket = theirs.ticket(longer)
        first = await theirs.prefill(longer, ticket)
        assert (first.info.local_tokens, first.info.stored_tokens) == (0, 512)
        rest = await theirs.decode(longer, [first.first], ticket)
        assert rest.started.fetched_tokens + rest.started.local_tokens == 900
        assert [rest.tokens[0]] == undisturbed(longer)
        await mesh.assert_clean()


async def test_a_prompt_that_is_stored_whole_still_gives_its_first_token() -> None:
    async with Mesh(prefill=2) as mesh:
        ours, theirs = Calls(mesh), Calls(mesh, prefill="prefill-1")
        text = prompt(512)
        await ours.decode(text, [(await ours.prefill(text, ticket := ours.ticket(text))).first], ticket)
        first = await theirs.prefill(text, ticket := theirs.ticket(text))
        assert first.info.stored_tokens == 511
        assert first.published.chunks == 2
        assert [(await theirs.decode(text, [first.first], ticket)).tokens[0]] == undisturbed(text)
        await mesh.assert_clean()


async def test_many_at_once_do_not_mix(calls: Calls) -> None:
    async def one(number: int) -> None:
        text = prompt(100 + 60 * number, salt=number)
        ticket = calls.ticket(text)
        first = await calls.prefill(text, ticket)
        rest = await calls.decode(text, [first.first], ticket)
        assert [rest.tokens[0]] == undisturbed(text)

    await asyncio.gather(*(one(number) for number in range(12)))


async def test_without_a_ticket_decode_computes_the_prompt_itself(calls: Calls) -> None:
    text = prompt(700)
    rest = await calls.decode(text, [[]])
    assert [rest.tokens[0]] == undisturbed(text)
    assert (rest.started.fetched_tokens, rest.started.recomputed_tokens) == (0, 699)
    assert rest.started.recompute_reason == "no KV was offered"


async def test_without_a_ticket_prefill_publishes_nothing(calls: Calls) -> None:
    first = await calls.prefill(prompt(300), None)
    assert [first.first] == [undisturbed(prompt(300))[0][:1]]
    assert (first.published.chunks, first.published.reason) == (0, "")


@pytest.mark.parametrize("done", [1, 2, 10, 23])
@pytest.mark.parametrize("with_ticket", [True, False])
async def test_resumed_after_some_tokens_goes_on_as_if_undisturbed(calls: Calls, done: int, with_ticket: bool) -> None:
    text, whole = prompt(300), undisturbed(prompt(300))[0]
    ticket = calls.ticket(text) if with_ticket else None
    await calls.prefill(text, ticket)
    rest = await calls.decode(text, [whole[:done]], ticket)
    assert rest.tokens[0] == whole
    assert rest.started.recomputed_tokens == (0 if with_ticket else 300) + done - 1


async def test_samples_resume_each_from_where_they_were(calls: Calls) -> None:
    text, whole = prompt(300), undisturbed(prompt(300), SEEDED)
    ticket = calls.ticket(text)
    await calls.prefill(text, ticket, SEEDED)
    had = [whole[0][:1], whole[1][:7], []]
    rest = await calls.decode(text, had, ticket, SEEDED)
    assert [rest.tokens[index] for index in range(3)] == whole


async def test_the_first_tokens_come_at_once_and_later_ones_as_they_are_ready(calls: Calls) -> None:
    rest = await calls.decode(prompt(20), [[]], None, replace(GREEDY, max_tokens=400))
    assert len(rest.tokens[0]) == 400
    assert rest.order[0] == ["started", "samples"]
    assert len(rest.order) <= 400


async def test_heartbeats_while_nothing_else_is_said() -> None:
    async with Mesh(kvstore=0, prefill_settings={"fake_step_seconds": 0.7}, decode=0) as mesh:
        first = await Calls(mesh).prefill(prompt(600), None)
        assert first.order.count("progress") >= 2
        await mesh.assert_clean()


# What is refused ---------------------------------------------------------------------------------------------------


async def test_another_layout_is_refused_with_its_fields() -> None:
    async with Mesh(kvstore=0) as mesh:
        calls = Calls(mesh)
        with pytest.raises(Mismatch, match="no known worker has the other"):
            await calls.decode(prompt(20), [[1]], fingerprint="f" * 64)
        with pytest.raises(Mismatch, match="serves model 'fake', not 'other'"):
            await calls.prefill(prompt(20), None, model="other")
        with pytest.raises(Mismatch, match=FINGERPRINT[:12]):
            await calls.prefill(prompt(20), None, fingerprint="f" * 64)
        await mesh.assert_clean()


async def test_bad_values_are_named_together(calls: Calls) -> None:
    bad = replace(GREEDY, top_p=2.0, temperature=-1.0)
    for call in (calls.prefill((), None, bad), calls.decode((), [[]], None, bad)):
        with pytest.raises(InvalidArgument) as refusal:
            await call
        assert {name for name, _ in refusal.value.violations} == {"prompt_token_ids", "top_p", "temperature"}
    with pytest.raises(InvalidArgument):
        await calls.decode(prompt(20), [])
    with pytest.raises(InvalidArgument):
        await calls.decode(prompt(4096), [[]])
    with pytest.raises(InvalidArgument):
        await calls.abort_decode("")
    with pytest.raises(InvalidArgument):
        await calls.abort_prefill("")


async def test_a_full_queue_and_a_request_that_could_never_fit() -> None:
    settings = {"kv_blocks": 40, "max_waiting": 0, "fake_step_seconds": 0.05}
    async with Mesh(kvstore=0, prefill=0, decode_settings=settings) as mesh:
        calls = Calls(mesh)
        with pytest.raises((Overloaded, InvalidArgument)):
            await calls.decode(prompt(1000), [[]])
        await mesh.assert_clean()


async def test_the_same_request_id_twice() -> None:
    async with Mesh(kvstore=0, prefill=0, decode_settings={"fake_step_seconds": 0.02}) as mesh:
        calls = Calls(mesh)
        running = asyncio.create_task(calls.decode(prompt(20), [[]], request_id="twin"))
        await mesh.until("decode-0", lambda statistics: statistics.running == 1)
        with pytest.raises(AlreadyExists):
            await calls.decode(prompt(20), [[]], request_id="twin")
        assert [(await running).tokens[0]] == undisturbed(prompt(20))
        await mesh.assert_clean()


async def test_a_worker_says_who_it_is(mesh: Mesh) -> None:
    info = mesh["prefill-0"].process.info
    assert (info.role, info.model, info.fingerprint) == (Role.PREFILL, "fake", FINGERPRINT)
    assert (info.capacity.first_layer, info.capacity.end_layer) == (0, 2)
    assert info.layout["model"] == "fake"
    restarted = (await mesh.restart("prefill-0")).process.info
    assert restarted.epoch > info.epoch
    assert restarted.address == info.address
