"""Incremental detokenisation equals decoding at once, however tokens are batched."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from kvmesh_router.detokenizer import GARBAGE, Detokenizer
from kvmesh_router.tokenizer import fake_tokenizer

FAKE = fake_tokenizer()
TEXT = st.text(alphabet=st.sampled_from("aé€😀 \n한"), max_size=40)


def sentencepiece():
    """A Llama-2-like tokenizer: metaspace, byte fallback, one leading space stripped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("▁a", "▁", "b", "▁hello", "<s>"):
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def batches(ids, sizes):
    start = 0
    for size in sizes:
        yield ids[start : start + size]
        start += size
    yield ids[start:]


def joined(decode, parts):
    detokenizer = Detokenizer(decode)
    return "".join([*map(detokenizer.feed, filter(None, parts)), detokenizer.flush()])


SIZES = st.lists(st.integers(1, 7), max_size=40)


@given(TEXT, SIZES)
def test_deltas_join_to_the_whole_text(text, sizes):
    assert joined(FAKE.decode, batches(list(text.encode()), sizes)) == text


@given(st.lists(st.integers(0, 300), max_size=120), SIZES)
def test_invalid_bytes_and_special_tokens_come_out_as_decode_has_them(ids, sizes):
    assert joined(FAKE.decode, batches(ids, sizes)) == FAKE.decode(ids)
    assert joined(FAKE.decode_all, batches(ids, sizes)) == FAKE.decode_all(ids)


@given(TEXT.filter(bool))
def test_never_half_a_character(text):
    detokenizer = Detokenizer(FAKE.decode)
    assert not any("\ufffd" in detokenizer.feed([byte]) for byte in text.encode())


@given(st.lists(st.one_of(st.integers(256, 260).map(lambda i: [i]), TEXT.map(lambda t: list(t.encode()))), max_size=40),
       SIZES)  # fmt: skip
def test_sentencepiece_spaces_and_byte_fallback(pieces, sizes):
    backend, ids = sentencepiece(), [token for piece in pieces for token in piece]
    assert joined(backend.decode, batches(ids, sizes)) == backend.decode(ids)


def test_a_character_cut_off_is_flushed_as_a_replacement():
    detokenizer = Detokenizer(FAKE.decode)
    assert detokenizer.feed([0x41, 0xE2, 0x82]) == "A"
    assert detokenizer.flush() == "\ufffd"


def test_a_fork_goes_its_own_way():
    detokenizer = Detokenizer(FAKE.decode)
    detokenizer.feed([0x41, 0xE2])
    fork = detokenizer.fork()
    assert detokenizer.feed([0x82, 0xAC]) == "€"
    assert fork.feed([0x82, 0xAD]) == "\u20ad"


@pytest.mark.parametrize("batch", [1, 7])
def test_endless_garbage_is_let_go_and_the_window_stays_small(batch):
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return FAKE.decode(ids)

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.feed([0xFF] * batch) for _ in range(4096 // batch))
    assert set(text) == {"\ufffd"}
    assert max(seen) <= 3 * GARBAGE
    assert detokenizer.feed([0x41]).endswith("A")
