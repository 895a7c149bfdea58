"""A server of OpenAI's completions as the generator sees it: exact counts of tokens, and failures as ours."""

import json

import pytest

from kvmesh.bench.targets import Message, OpenAiTarget
from kvmesh.errors import Unavailable

httpx2 = pytest.importorskip("httpx2")


def event(tokens: int, text: str) -> str:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens}
    return f"data: {json.dumps({'choices': [{'text': text}] if text else [], 'usage': usage})}\n\n"


async def ask(handler) -> list[Message]:
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(handler), base_url="http://server") as http:
        return [message async for message in OpenAiTarget(http, "m").ask([7, 8, 9], 3)]


async def test_tokens_are_counted_by_the_servers_usage():
    requests = []

    def handler(request):
        requests.append(json.loads(request.content))
        return httpx2.Response(
            200, text=event(1, "a") + ": ping\n\n" + event(3, "bc") + event(3, "") + "data: [DONE]\n\n"
        )

    messages = await ask(handler)
    assert [message.tokens for message in messages] == [1, 2, 0]
    asked = requests[0]
    assert (asked["prompt"], asked["max_tokens"], asked["ignore_eos"], asked["stream"]) == ([7, 8, 9], 3, True, True)


def refuse(request):
    raise httpx2.ConnectError("nobody there")


@pytest.mark.parametrize(
    ("handler", "message"),
    [(lambda request: httpx2.Response(503, text="busy"), "HTTP 503: busy"), (refuse, "ConnectError: nobody there")],
)
async def test_failures_are_unavailable(handler, message):
    with pytest.raises(Unavailable, match=message):
        await ask(handler)
