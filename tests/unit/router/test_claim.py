"""The tickets that the router writes: who is to hold what, how often, and on whose account."""

import pytest

from kvmesh.kv.keys import tenant_of
from kvmesh.kv.ticket import candidates, owners
from kvmesh.types import Role, SamplingParams, WorkerInfo
from kvmesh_router.claim import Claim
from kvmesh_router.config import RouterConfig
from kvmesh_router.events import Request

WORKER = WorkerInfo("prefill", 1, Role.PREFILL, "p:1", 1, fingerprint="f")
STORES = [WorkerInfo(f"store-{i}", 1, Role.KVSTORE, f"s:{i}", 1) for i in range(4)]


def claim(replicas=1, salt=""):
    request = Request("r", "m", tuple(range(2000)), SamplingParams(max_tokens=1), cache_salt=salt)
    return Claim(request, 1000, replicas)


@pytest.mark.parametrize("replicas", [1, 2, 3, 9])
def test_each_chunk_has_as_many_owners_as_there_can_be(replicas):
    ticket = claim(replicas).write(WORKER, STORES)
    for chunk in ticket.chunks:
        chosen = owners(ticket, chunk)
        assert chosen[0] == chunk.source
        assert len(set(chosen)) == len(chosen) == min(replicas, len(STORES))
        assert candidates(ticket, chunk)[: len(chosen)] == chosen


def test_the_account_is_that_of_the_salt_and_follows_the_ticket_to_the_next_worker():
    mine = claim(2, salt="mine")
    ticket = mine.write(WORKER, STORES)
    assert ticket.tenant == tenant_of("mine")
    assert claim().write(WORKER, STORES).tenant == b""
    mine.expect(ticket)
    mine.taken_over()
    again = mine.for_decode()
    assert (again.tenant, again.replicas) == (ticket.tenant, 2)
    assert again.lease_id != ticket.lease_id


def test_the_number_of_replicas_is_a_setting():
    assert RouterConfig().replicas == 1
    with pytest.raises(ValueError, match="replicas"):
        RouterConfig(replicas=0)
