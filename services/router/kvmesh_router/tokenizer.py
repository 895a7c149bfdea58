"""Text in, token ids out, and back: a model's tokenizer and its chat template.

Knows the files of a model folder and the stand-in for the fake model; nothing of requests or workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kvmesh.errors import InvalidArgument
from kvmesh_router.chat_template import ChatTemplate

LONG_TEXT = 8_192
"""Characters from which encoding leaves the event loop."""


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`, which is safe to share among threads."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self._backend = backend
        self._chat_template = chat_template

    @classmethod
    def from_file(cls, path: Path, chat_template: ChatTemplate | None = None) -> Tokenizer:
        """From a `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_file(str(path)), chat_template)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    async def encode(self, text: str) -> list[int]:
        """A prompt as it is, with what the tokenizer itself adds."""
        return await self._encode("text", text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> list[int]:
        """Messages through the chat template, which writes the special tokens itself.

        Raises:
            InvalidArgument: there is no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidArgument(violations=[("chat", "cannot be used: the model has no chat template")])
        text = self._chat_template.render(messages, add_generation_prompt)
        return await self._encode("chat", text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        return str(self._backend.decode(token_ids))

    def decode_all(self, token_ids: list[int]) -> str:
        """Text with special tokens."""
        return str(self._backend.decode(token_ids, skip_special_tokens=False))

    async def _encode(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        try:
            if len(text) < LONG_TEXT:
                return self._ids(text, add_special_tokens)
            return await asyncio.to_thread(self._ids, text, add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise InvalidArgument(violations=[(field, "is not valid Unicode")]) from error

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)


FAKE_VOCABULARY = 512
FAKE_EOS = 257
FAKE_TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def fake_tokenizer() -> Tokenizer:
    """For the fake model: ids 0 to 255 are bytes, 256 `<|begin|>`, 257 `<|end|>`, the rest special tokens."""
    alphabet = byte_alphabet()
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|begin|>", "<|end|>", *(f"<|{i}|>" for i in range(FAKE_EOS + 1, FAKE_VOCABULARY))]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend, ChatTemplate(FAKE_TEMPLATE, {"eos_token": "<|end|>"}))


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]
