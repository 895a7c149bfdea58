"""What bench/gpu.py keeps when a section ends badly, and libraries that travel. No device."""

import math
import signal
import sys
from pathlib import Path

import pytest

# Scripts find one another by their names, and are no package.
sys.path.append(str(Path(__file__).parents[3] / "bench"))
import gpu
import gpu_libraries

DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "import signal; signal.pause()"


@pytest.fixture
def report(tmp_path):
    report = gpu.Report(tmp_path / "gpu.json")
    report.write({"device": "none"})
    return report


def raises(report):
    report.add("decode", {"batch": 1})
    raise ValueError("no kernel\n" + "nvcc said so\n" * 1000)


def test_what_a_section_raises_is_in_the_report_with_all_rows(report):
    report.add("check", {"path": "a", "passed": True})
    with pytest.raises(ValueError, match="no kernel"):
        gpu.recorded("decode", lambda: raises(report), report)
    report.add("prefill", {"tokens": 512})
    content = report.read()
    assert content["check"] == {"rows": [{"path": "a", "passed": True}]}
    assert content["decode"]["rows"] == [{"batch": 1}]
    assert content["decode"]["error"].startswith("ValueError: no kernel\n" + "nvcc said so\n" * 1000)
    assert "in raises" in content["decode"]["error"]
    assert gpu.failures(content, ["check", "decode", "prefill"]) == ["decode"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("pass", None),
        ("raise SystemExit(3)", "ended with status 3"),
        (DIES, f"ended with status -{signal.SIGKILL.value}"),
        (HANGS, "killed after 0.5 s"),
    ],
)
def test_rows_outlive_their_process(report, code, error):
    report.add("decode", {"batch": 1})
    gpu.supervise("decode", [sys.executable, "-c", code], 30.0 if code != HANGS else 0.5, report)
    assert report.read()["decode"] == {"rows": [{"batch": 1}]} | ({"error": error} if error else {})
    assert [path.name for path in report.path.parent.iterdir()] == ["gpu.json"]


def test_what_a_section_says_itself_outweighs_its_status(report):
    report.fail("decode", "ValueError: no kernel")
    gpu.supervise("decode", [sys.executable, "-c", "raise SystemExit(1)"], 30.0, report)
    assert report.read()["decode"]["error"] == "ValueError: no kernel"


@pytest.mark.parametrize("errors", [[math.nan, 0.004], [0.004, math.nan], [0.004, 0.06]])
def test_neither_nan_nor_a_large_error_passes(report, errors):
    report.add("check", gpu.outcome(lambda: gpu.worst(errors), 0.05))
    assert gpu.failures(report.read(), ["check"]) == ["check"]


def test_small_errors_pass(report):
    report.add("check", gpu.outcome(lambda: gpu.worst([0.004, 0.04]), 0.05))
    assert gpu.failures(report.read(), ["check"]) == []


def test_a_path_that_fails_is_a_row_with_the_whole_message(capsys):
    row = gpu.outcome(lambda: raises(gpu.Report(Path("/nowhere/gpu.json"))), 0.05)
    assert not row["passed"]
    assert row["problem"].startswith("FileNotFoundError")
    assert "in raises" in capsys.readouterr().err


def test_brackets_of_an_error_are_shown_as_they_are(capsys):
    gpu.show("check", {"rows": [{"problem": "ld: [/usr/lib] is missing\nmore"}], "error": "killed [/by]"})
    shown = capsys.readouterr().out
    assert "[/usr/lib] is missing" in shown
    assert "killed [/by]" in shown


@pytest.mark.parametrize("name", ["libraries", "libraries.tar"])
def test_libraries_travel(tmp_path, name):
    target, taken = tmp_path / "made" / name, tmp_path / "taken"
    for library in ("page", "cascade"):
        compiled = tmp_path / "compiled" / library / f"{library}.so"
        compiled.parent.mkdir(parents=True)
        compiled.write_bytes(library.encode())
        gpu_libraries.copy_in([compiled], "0.6.6", target)
    gpu_libraries.copy_out(target, "0.6.6", taken)
    assert (taken / "page" / "page.so").read_bytes() == b"page"
    assert (taken / "cascade" / "cascade.so").read_bytes() == b"cascade"
    assert [path.name for path in target.parent.iterdir()] == [name]
    with pytest.raises(SystemExit, match=r"no libraries of FlashInfer 0\.6\.7"):
        gpu_libraries.copy_out(target, "0.6.7", taken)
