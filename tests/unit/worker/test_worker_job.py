"""What a worker refuses, and the reason that it gives."""

from dataclasses import replace

import pytest

from kvmesh.engine.api import Sample
from kvmesh.errors import InvalidArgument, Mismatch
from kvmesh.kv.keys import fingerprint
from kvmesh.types import KvTicket, Role, SamplingParams, WorkerInfo
from kvmesh.worker.job import check
from tests.unit.worker.fakes import LAYOUT, MODEL, job, ticket

OTHER_LAYOUT = {**LAYOUT, "dtype": "float16", "kv_heads": "3"}
OTHER = fingerprint(OTHER_LAYOUT)


def test_what_fits_is_taken() -> None:
    check(job(), MODEL)
    check(job(ticket=None), MODEL)
    check(job(ticket=KvTicket("", "", 0)), MODEL)


def test_another_model() -> None:
    with pytest.raises(Mismatch, match="serves model 'fake', not 'llama'"):
        check(job(model="llama"), MODEL)


def test_another_layout_names_the_fields_if_a_peer_has_it() -> None:
    peer = WorkerInfo("p", 1, Role.PREFILL, "h:1", 1, "fake", OTHER, OTHER_LAYOUT)
    with pytest.raises(Mismatch) as refusal:
        check(job(fingerprint=OTHER), MODEL, [peer])
    assert "dtype is 'float16' there, 'float32' here, kv_heads is '3' there, '1' here" in str(refusal.value)


def test_another_layout_that_nobody_has() -> None:
    with pytest.raises(Mismatch, match="no known worker has the other"):
        check(job(fingerprint=OTHER), MODEL)


def test_a_ticket_of_another_layout() -> None:
    work = job()
    with pytest.raises(Mismatch, match=OTHER[:12]):
        check(replace(work, ticket=replace(work.ticket, fingerprint=OTHER)), MODEL)


def test_a_ticket_of_other_layers() -> None:
    work = job()
    chunks = tuple(replace(chunk, end_layer=1) for chunk in work.chunks)
    with pytest.raises(Mismatch, match="layers"):
        check(replace(work, ticket=replace(work.ticket, chunks=chunks)), MODEL)


def test_all_bad_values_are_named_together() -> None:
    bad = SamplingParams(max_tokens=0, temperature=-1, top_p=2, n=0)
    with pytest.raises(InvalidArgument) as refusal:
        check(job(request_id="", sampling=bad, samples=(), ticket=None), MODEL)
    named = {name for name, _ in refusal.value.violations}
    assert named >= {"request_id", "samples", "max_tokens", "temperature", "top_p", "n"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ()}, "prompt_token_ids"),
        ({"prompt": (1, 512)}, "prompt_token_ids"),
        ({"prompt": tuple([1] * 4096)}, "prompt_token_ids"),
        ({"samples": (Sample(1),)}, "samples"),
        ({"samples": (Sample(0), Sample(0))}, "samples"),
        ({"samples": (Sample(0, (1,) * 8),)}, "samples"),
        ({"samples": (Sample(0, (999,)),)}, "prompt_token_ids"),
    ],
)
def test_one_bad_value(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        check(job(**{"ticket": None, **changes}), MODEL)
    assert [name for name, _ in refusal.value.violations] == [field]


def test_a_ticket_with_a_gap_or_beyond_the_prompt() -> None:
    work = job()
    for chunks in (work.chunks[1:], ticket(range(700)).chunks, (work.chunks[0], work.chunks[0])):
        with pytest.raises(InvalidArgument, match="ticket"):
            check(replace(work, ticket=replace(work.ticket, chunks=tuple(chunks))), MODEL)


def test_tokens_that_may_be_loaded() -> None:
    assert job(600).loadable_tokens == 599
    assert job(600, samples=(Sample(0, (1,)),)).loadable_tokens == 600
    assert job(600, samples=(Sample(0, (1,)), Sample(1))).loadable_tokens == 599
