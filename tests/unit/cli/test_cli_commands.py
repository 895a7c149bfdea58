"""The command line as a user meets it: real processes, one sentence for each failure, never a traceback."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from kvmesh import __version__
from kvmesh.cli.main import execute
from kvmesh.errors import InvalidArgument
from kvmesh.v1 import common_pb2, router_pb2
from tests.unit.client.scripted_router import (
    ScriptedRouter,
    delta_message,
    finish_message,
    prompt_message,
    threaded_router,
)

ANSWER = (prompt_message(), delta_message("Par", 1), delta_message("is", 2), finish_message())
COMMAND = [sys.executable, "-c", "from kvmesh.cli.main import main; main()"]
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def kvmesh(tmp_path):
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "200"}
    environment.pop("KVMESH_ADDRESS", None)

    def run(*arguments, stdin="", **variables):
        return subprocess.run(
            [*COMMAND, *arguments], env={**environment, **variables}, input=stdin, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    run.environment = environment
    return run


def test_version(kvmesh):
    result = kvmesh("--version")
    assert (result.returncode, result.stdout) == (0, f"kvmesh {__version__}\n")


@pytest.mark.parametrize(
    "command",
    ["", "up", "down", "run", "generate", "chat", "status", "models", "models pull", "models list", "bench serve"],
)
def test_help_of_every_command(command, capsys):
    assert execute([*command.split(), "--help"]) == 0
    assert f"Usage: {' '.join(['kvmesh', *command.split()])}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nope"], 2, "No such command 'nope'"),
        (["generate"], 2, "Missing argument"),
        (["generate", "hi", "--temperature", "hot"], 2, "--temperature"),
        (["generate", "hi", "--nope"], 2, "--nope"),
        (["generate", "hi", "--raw", "--address", NOWHERE], 1, f"no router answers at {NOWHERE}"),
        (["generate", "hi", "--address", NOWHERE], 1, f"no router answers at {NOWHERE}"),
        (["chat", "--address", NOWHERE], 1, "kvmesh up"),
        (["status", "--address", NOWHERE], 1, "kvmesh up"),
        (
            ["generate", "hi", "--raw", "--top-k", "-3", "--max-tokens", "-1", "--address", NOWHERE],
            1,
            "top_k cannot be -3",
        ),
        (["up", "--decode", "0"], 1, "--decode"),
        (["up", "--memory", "12 parsecs"], 1, "'12 parsecs' is not a size"),
        (["up", "--model", "no-such-model"], 1, "no-such-model"),
        (["run", "hi", "--model", "no-such-model"], 1, "no-such-model"),
        (["models", "pull", "no-such-model"], 1, "no-such-model"),
        (["bench", "serve", "--rate", "0"], 2, "--rate"),
        (["bench", "serve", "--trace", "no-such.csv"], 1, "no-such.csv"),
        (["bench", "serve", "--prompt-tokens", "many"], 1, "'many' is not a length"),
        (["bench", "serve", "--address", NOWHERE], 1, f"no router answers at {NOWHERE}"),
    ],
)
def test_a_failure_is_one_sentence(kvmesh, arguments, code, words):
    result = kvmesh(*arguments)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvmesh: ")
    assert words in line


def test_every_impossible_value_is_named(kvmesh):
    result = kvmesh("generate", "hi", "--raw", "--top-k", "-3", "--max-tokens", "-1", "--address", NOWHERE)
    assert "top_k" in result.stderr
    assert "max_tokens" in result.stderr


def test_a_prompt_that_is_not_utf8(kvmesh):
    result = subprocess.run(
        [*COMMAND, "generate", b"\xff\xfe"],
        env=kvmesh.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "kvmesh: the prompt is not valid UTF-8\n")


def test_the_address_comes_from_the_environment(kvmesh):
    assert "127.0.0.1:2" in kvmesh("status", KVMESH_ADDRESS="127.0.0.1:2").stderr


def test_down_without_a_mesh_is_fine(kvmesh):
    result = kvmesh("down")
    assert (result.returncode, result.stdout) == (0, "no mesh is up\n")


def test_a_taken_port_is_named(kvmesh):
    with threaded_router(ScriptedRouter()) as (address, _):
        port = address.rpartition(":")[2]
        result = kvmesh("up", "--model", "fake", "--port", port)
    assert (result.returncode, result.stderr) == (1, f"kvmesh: port {port} is taken; choose another one with --port\n")


def test_generate_streams_the_answer(kvmesh):
    router = ScriptedRouter(ANSWER, models=[router_pb2.ModelInfo(name="m")])
    with threaded_router(router) as (address, _):
        result = kvmesh("generate", "-", "--timings", "--seed", "3", "--address", address, stdin="Where?")
    assert (result.returncode, result.stdout) == (0, "Paris\n")
    assert "first token 250 ms" in result.stderr
    (request,) = router.requests
    assert (request.text, request.sampling.seed) == ("Where?", 3)
    assert not request.sampling.HasField("temperature")


def test_a_model_with_a_template_gets_a_chat(kvmesh):
    router = ScriptedRouter(ANSWER, models=[router_pb2.ModelInfo(name="m", has_chat_template=True)])
    with threaded_router(router) as (address, _):
        kvmesh("generate", "Where?", "--address", address)
        kvmesh("generate", "Where?", "--raw", "--address", address)
    assert [request.WhichOneof("input") for request in router.requests] == ["chat", "text"]


def test_generate_json(kvmesh):
    with threaded_router(ScriptedRouter(ANSWER)) as (address, _):
        result = kvmesh("generate", "Where?", "--raw", "--json", "--address", address)
    document = json.loads(result.stdout)
    assert (document["request_id"], document["seed"]) == ("r", 7)
    (output,) = document["outputs"]
    assert (output["text"], output["token_ids"], output["reason"], output["stop"]) == ("Paris", [1, 2], "stop", "\n")
    assert document["usage"]["cached_tokens"] == 1


def test_a_refusal_is_one_sentence(kvmesh):
    script = [InvalidArgument(violations=[("top_p", "must be in (0, 1]"), ("n", "must be in [1, 64]")])]
    with threaded_router(ScriptedRouter(script)) as (address, _):
        result = kvmesh("generate", "hi", "--raw", "--address", address)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "kvmesh: top_p must be in (0, 1]; n must be in [1, 64]"


def test_ctrl_c_stops_the_generation(kvmesh):
    router = ScriptedRouter((prompt_message(), delta_message("Par", 1), None))
    with threaded_router(router) as (address, _):
        command = [*COMMAND, "generate", "hi", "--raw", "--address", address]
        process = subprocess.Popen(command, env=kvmesh.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.read(3) == b"Par"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, b"kvmesh: interrupted")
    assert router.cancelled.is_set()


def test_chat_keeps_the_conversation(kvmesh):
    router = ScriptedRouter(ANSWER, models=[router_pb2.ModelInfo(name="m", has_chat_template=True)])
    with threaded_router(router) as (address, _):
        result = kvmesh(
            "chat", "--system", "Be brief.", "--address", address, stdin="Where?\n\nWhy?\n/clear\nWho?\n/quit\n"
        )
    assert result.returncode == 0
    turns = [[(m.role, m.content) for m in request.chat.messages] for request in router.requests]
    start = [("system", "Be brief."), ("user", "Where?")]
    assert turns == [start, [*start, ("assistant", "Paris"), ("user", "Why?")], [start[0], ("user", "Who?")]]


def test_chat_goes_on_after_an_error_and_ends_with_the_input(kvmesh):
    router = ScriptedRouter([InvalidArgument("too long")], models=[router_pb2.ModelInfo(name="m")])
    with threaded_router(router) as (address, _):
        result = kvmesh("chat", "--address", address, stdin="one\ntwo\n")
    assert result.returncode == 0
    assert result.stderr.count("too long") == 2
    assert [request.text for request in router.requests] == ["one", "two"]


def worker(**statistics):
    info = common_pb2.WorkerInfo(
        worker_id="decode-0", epoch=3, role=common_pb2.WORKER_ROLE_DECODE, address="127.0.0.1:9", pid=77
    )
    return router_pb2.WorkerStatus(info=info, statistics=common_pb2.WorkerStatistics(**statistics))


def test_status_as_table_and_json(kvmesh):
    router = ScriptedRouter(workers=[worker(running=2, blocks_used=5, blocks_cached=6, blocks_total=64, leases=1)])
    with threaded_router(router) as (address, _):
        table = kvmesh("status", "--address", address).stdout
        (entry,) = json.loads(kvmesh("status", "--json", "--address", address).stdout)
    for words in ("decode", "decode-0", "127.0.0.1:9", "77", "5/6/64"):
        assert words in table
    assert (entry["role"], entry["epoch"], entry["statistics"]["leases"]) == ("decode", 3, 1)


def test_status_check_fails_on_a_broken_pool(kvmesh):
    router = ScriptedRouter(workers=[worker(integrity_errors=["block 3 is lost"])])
    with threaded_router(router) as (address, _):
        result = kvmesh("status", "--check", "--address", address)
    assert result.returncode == 1
    assert "block 3 is lost" in result.stdout
    assert "decode-0" in result.stderr


def test_bench_serve(kvmesh, tmp_path):
    router = ScriptedRouter(ANSWER, models=[router_pb2.ModelInfo(name="m", max_model_len=64, vocabulary_size=512)])
    with threaded_router(router) as (address, _):
        result = kvmesh(
            "bench", "serve", "--address", address, "--rate", "200", "--requests", "10", "--prompt-tokens", "100",
            "--slo-ttft", "5", "--json", str(tmp_path / "out.json"),
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "10 requests" in result.stdout
    assert "10 requests were cut" in result.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["figures"]["attainment"] == 1.0
    assert len(document["requests"]) == 10
    assert {len(request.token_ids.ids) for request in router.requests} == {32}


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_chat(kvmesh):
    script = (prompt_message(), delta_message("Par", 1), None)
    router = ScriptedRouter(script, models=[router_pb2.ModelInfo(name="m", has_chat_template=True)])
    with threaded_router(router) as (address, loop):
        process = subprocess.Popen(
            [*COMMAND, "chat", "--address", address], env=kvmesh.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.read(5) == b"> Par"
        process.send_signal(signal.SIGINT)
        asyncio.run_coroutine_threadsafe(asyncio.wait_for(router.cancelled.wait(), 20), loop).result(30)
        router.script = ANSWER
        process.communicate(b"two\n/quit\n", timeout=30)
    assert process.returncode == 0
    last = [(m.role, m.content) for m in router.requests[-1].chat.messages]
    assert last == [("user", "one"), ("assistant", "Par"), ("user", "two")]
