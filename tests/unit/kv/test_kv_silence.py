"""Who did not answer is asked last, for a while."""

from kvmesh.kv.silence import SECONDS, Silence
from kvmesh.types import ChunkSource, KvTicket

TICKET = KvTicket("f", "l", 1, sources=tuple(ChunkSource(name, name) for name in "abc"))


def test_the_silent_come_last_in_order_until_they_are_heard_or_the_time_is_over():
    now = [0.0]
    silence = Silence(lambda: now[0])
    assert silence.last(TICKET, (2, 0, 1)) == (2, 0, 1)
    silence.note("c")
    now[0] = 1.0
    silence.note("a")
    assert silence.last(TICKET, (2, 0, 1)) == (1, 2, 0)
    silence.broken("c")
    silence.broken("b")
    assert silence.last(TICKET, (2, 0, 1)) == (2, 1, 0)
    now[0] = 1.0 + SECONDS
    assert "a" not in silence
