"""Signals, closed pipes and poor encodings: how a command ends, and what it goes on without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import tiny
from tinygpt import signals


def start(program: str, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


# A command that waits, in Python or in one call of a library, and says when it has begun.
WAITING = """
import hashlib, os, signal, sys, time
from tinygpt import cli, signals
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

@cli.one_line_errors
def main():
    how = sys.argv[1]
    with signals.handled(print) if how == "noting" else signals.obeyed():
        print("begun", flush=True)
        if how == "library":
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1_000_000_000)
        time.sleep(1 if "nohup" in sys.argv else 60)
    print("ended")

main()
"""


def stopped(process: subprocess.Popen[str], *numbers: int) -> tuple[int, str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(2 * signals.ONE_REQUEST if len(numbers) > 1 else 0)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("number", [n for n in signals.STOPPING if n != signal.SIGINT])
def test_a_signal_ends_a_command_with_its_code_and_one_line(number: signal.Signals) -> None:
    code, said = stopped(start(WAITING, "waiting"), number)
    assert code == 128 + number
    assert said == f"stopped by {number.name}; the same command resumes from what is saved\n"


def test_an_ignored_hangup_stays_ignored() -> None:
    code, said = stopped(start(WAITING, "waiting", "nohup"), signal.SIGHUP)
    assert (code, said) == (0, "")


def test_a_second_signal_leaves_at_once() -> None:
    """And what waits inside a library for minutes needs no second one."""
    code, said = stopped(start(WAITING, "noting"), signal.SIGTERM, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert said == "stopped at once by SIGINT; the same command resumes from what is saved\n"
    code, said = stopped(start(WAITING, "library"), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert said.count("\n") == 1


def test_two_signals_of_a_closing_terminal_are_one_request() -> None:
    heard: list[int] = []
    with signals.handled(heard.append):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert signals.received() == signal.SIGHUP
    assert heard == [signal.SIGHUP]
    assert signals.received() is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


# The command, but it is sent a signal within its first evaluation, and nobody reads its stdout.
IN_ITS_FIRST_EVALUATION = """
import os, signal, sys
from tinygpt import run
from tinygpt.training.module import LanguageModel

step = LanguageModel.validation_step

def interrupted(*arguments):
    if not os.path.exists("sent"):
        open("sent", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)

LanguageModel.validation_step = interrupted
run.main()
"""


@pytest.mark.slow
def test_a_signal_in_the_first_evaluation_saves_the_first_step_and_a_closed_pipe_is_no_matter(
    tmp_path: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    words = tiny(corpus, f"cache_dir={cache}", "run_name=r")
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    plain["PYTHONCOERCECLOCALE"] = "0"
    process = start(IN_ITS_FIRST_EVALUATION, *words, **plain)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=300)
    line = "stopped by SIGTERM at step 1 of 12; the same command resumes from there"
    assert (process.returncode, said) == (128 + signal.SIGTERM, line + "\n")
    run = tmp_path / "outputs/runs/r"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    assert (run / "run.log").read_text("utf-8").endswith(f" {line}\n")
    out, said = start(IN_ITS_FIRST_EVALUATION, *words, **plain).communicate(timeout=300)
    assert (run / "results.json").exists(), said
    assert " -> " in out


# --- streams

PRINTING = "from tinygpt import streams; streams.survive(); import sys; "


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"5.1 -> 4.2 \\xb5\\u03b1 x\\udc80\n"),
        ("cp1252", b"5.1 -> 4.2 \xb5\\u03b1 x\\udc80\n"),
        ("utf-8", "5.1 → 4.2 µα x\\udc80\n".encode()),
    ],
)
def test_any_text_can_be_printed(encoding: str, printed: bytes) -> None:
    program = PRINTING + r"print('5.1 \u2192 4.2 \xb5\u03b1 x\udc80')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout.replace(b"\r\n", b"\n") == printed


def test_a_reader_that_leaves_is_no_error() -> None:
    process = start(PRINTING + "[print('x' * 9999, flush=True) for _ in range(99)]; sys.exit(7)")
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (7, "")


def test_streams_that_are_closed_at_the_start_take_no_file_of_ours(tmp_path: Path) -> None:
    program = PRINTING + "f = open('own', 'w'); print('said'); print('said', file=sys.stderr)"
    program += "; import os; os.write(1, b'said'); os.write(2, b'said'); f.write('mine')"
    command = f'"{sys.executable}" -c "{program}" >&- 2>&-'
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(Path.cwd()))}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0
    assert (tmp_path / "own").read_text() == "mine"
