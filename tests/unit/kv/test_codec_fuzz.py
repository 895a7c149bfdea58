"""Forged streams with valid checksums: refused or finite, never a crash, never more memory than they declare."""

import pytest

from tests.unit.kv.codec_fuzz import codecs, fuzz, peak

CODECS = codecs()
NAMES = [codec.namespace[:12] for codec in CODECS]


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_forged_streams_are_refused_or_finite(codec):
    assert 0 < fuzz(codec, 2000) < 2000


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_memory_is_bounded_by_what_a_stream_declares(codec):
    assert peak(codec, 150) <= 1
