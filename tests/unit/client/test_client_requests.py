"""Options become exactly the fields set, and what the wire cannot carry is named."""

import pytest

from kvmesh.client.requests import Message, Options, build_request
from kvmesh.errors import InvalidArgument
from kvmesh.v1 import router_pb2 as pb


def build(prompt=None, chat=None, token_ids=None, **options):
    return build_request(pb.GenerateStreamRequest, prompt, chat, token_ids, options)


def test_only_given_options_are_set():
    request = build("hi", temperature=0.0, max_tokens=5, stop=["\n"], logprobs=2)
    assert request.text == "hi"
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert (request.stopping.max_tokens, list(request.stopping.stop)) == (5, ["\n"])
    assert request.response.logprobs == 2


def test_every_option_has_a_field():
    samples = {"float": 0.5, "int": 3, "bool": True, "str": "x"}
    for name, kind in Options.__annotations__.items():
        text = kind.__forward_arg__
        value = {"Mapping[int, float]": {1: 2.0}, "Sequence[str]": ["x"], "Sequence[int]": [4]}.get(text)
        build("hi", **{name: value if value is not None else samples[text]})


def test_text_option_is_not_the_prompt():
    request = build("hi", text=False)
    assert (request.text, request.response.text) == ("hi", False)


def test_logit_bias_and_stop_token_ids():
    request = build("hi", logit_bias={3: -1.5}, stop_token_ids=(4, 5))
    assert dict(request.sampling.logit_bias) == {3: -1.5}
    assert list(request.stopping.stop_token_ids) == [4, 5]


def test_chat_and_token_ids():
    chat = build(chat=[Message(role="user", content="hi")])
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hi")]
    assert list(build(token_ids=[1, 2]).token_ids.ids) == [1, 2]


@pytest.mark.parametrize("inputs", [{"chat": []}, {"token_ids": []}, {"prompt": ""}])
def test_an_empty_input_still_says_its_kind(inputs):
    assert build(**inputs).WhichOneof("input") in ("chat", "token_ids", "text")


@pytest.mark.parametrize("inputs", [{}, {"prompt": "a", "token_ids": [1]}])
def test_exactly_one_input(inputs):
    with pytest.raises(InvalidArgument, match="exactly one"):
        build(**inputs)


def test_all_impossible_values_are_named_together():
    with pytest.raises(InvalidArgument) as caught:
        build(token_ids=[-1], top_k=-3, temperature="hot", max_tokens=2**40)
    assert {name for name, _ in caught.value.violations} == {"top_k", "temperature", "max_tokens", "ids"}


def test_unknown_option():
    with pytest.raises(InvalidArgument, match="temprature"):
        build("hi", temprature=1.0)


def test_request_ids_are_chosen_and_kept():
    assert build("a").request_id != build("a").request_id
    assert build("a", request_id="mine").request_id == "mine"
