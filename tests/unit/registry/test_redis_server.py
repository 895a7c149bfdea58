"""The embedded server answers, ends, and says clearly why it cannot start."""

import os
import stat
from pathlib import Path

import pytest
from redis import Redis

from kvmesh import redis_server
from kvmesh.errors import Unavailable


def test_it_answers_once_started_and_is_gone_once_stopped():
    with redis_server.start() as server:
        client = Redis.from_url(server.url)
        assert client.ping()
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.info("server")["process_id"] == server.pid
        client.close()
        folder = server.folder
    assert server.process.poll() is not None
    assert not folder.exists()
    server.stop()


def test_a_given_folder_stays(tmp_path):
    with redis_server.start(folder=tmp_path / "new") as server:
        pass
    assert (server.folder / "redis.log").exists()


def test_a_port_in_use_is_one_clear_error(tmp_path):
    with redis_server.start() as server, pytest.raises(Unavailable, match=f"did not start on port {server.port}: .+"):
        redis_server.start(port=server.port, folder=tmp_path)


def test_a_server_on_the_path_comes_before_the_bundled_one(tmp_path):
    bundled = redis_server.find_binary(path=str(tmp_path))
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert redis_server.find_binary(path=str(tmp_path)) == program
    assert bundled.name == "valkey-server"
    assert os.access(bundled, os.X_OK)


def test_a_server_that_ends_at_once_is_one_clear_error(tmp_path):
    with pytest.raises(Unavailable, match=r"false did not start on port .*: it left no log"):
        redis_server.start(folder=tmp_path, binary=Path("/bin/false"))
