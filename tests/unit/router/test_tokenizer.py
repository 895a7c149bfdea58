"""Tokenizer and chat template."""

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh_router.chat_template import ChatTemplate
from kvmesh_router.tokenizer import FAKE_EOS, LONG_TEXT, fake_tokenizer

FAKE = fake_tokenizer()
HI = [{"role": "user", "content": "Hi"}]


async def test_fake_ids_are_bytes():
    text = "Grüße, 世界 😀\n"
    assert await FAKE.encode(text) == list(text.encode())
    assert FAKE.decode(list(range(128))) == bytes(range(128)).decode()
    assert await FAKE.encode("<|end|>") == [FAKE_EOS]


async def test_special_tokens_are_shown_when_asked():
    ids = [0x41, FAKE_EOS, 300]
    assert FAKE.decode(ids) == "A"
    assert FAKE.decode_all(ids) == "A<|end|><|300|>"


async def test_long_text_off_the_loop_gives_the_same():
    text = "ab" * LONG_TEXT
    assert await FAKE.encode(text) == list(text.encode())


async def test_a_lone_surrogate_is_refused():
    with pytest.raises(InvalidArgument, match="not valid Unicode"):
        await FAKE.encode("a\ud800b")


async def test_fake_chat():
    assert bytes(await FAKE.encode_chat(HI, True)) == b"user: Hi\nassistant: "
    assert bytes(await FAKE.encode_chat(HI, False)) == b"user: Hi\n"


def test_template_helpers_as_in_transformers():
    source = """
    {%- for message in messages %}
        {%- if message.role == 'skip' %}{% continue %}{% endif %}
        {{- bos_token + message['content'] | trim }}{{ message | tojson }}
    {%- endfor %}
    {{- strftime_now('%Y') | length }}"""
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render([{"role": "skip"}, {"role": "user", "content": " é "}], False)
    assert rendered == '<s>é{"role": "user", "content": " é "}4'


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}",
     "{{ messages[0].content + 1 }}", "{{ undefined.attribute }}"],
)  # fmt: skip
def test_a_template_that_fails_or_reaches_out_is_an_invalid_argument(source):
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplate(source, {}).render(HI, True)
