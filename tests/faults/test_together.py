"""Several at once, a clock that jumps, Slurm, numbers that are none."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import tiny
from tests.faults.conftest import Injected, succeeded
from tests.faults.test_kills import SHORT, files, nothing_torn, study_and_law
from tests.faults.warm import Strike, Warm
from tests.test_resume import outcome

PREPARED = ("tokenizer=bpe", "tokenizer.vocab_size=300", "plan=true")


def both(warm: Warm, *words: str, what: str) -> None:
    """One of two ends well; so does the other, which found all done, or says why not."""
    commands = [warm.start(*words) for _ in range(2)]
    ended = sorted((command.ended() for command in commands), key=lambda e: e.code)
    assert [e.code for e in ended] in ([0, 0], [0, 2]), ended
    for one in ended:
        if one.code == 2:
            assert one.line.endswith(f": another process is training this {what}")
        elif ended[1].code == 0:
            assert "already finished" in ended[0].out + ended[1].out or what == "study"


def test_one_run_begun_twice(warm: Warm, words: list[str], whole: Path, injected: Injected) -> None:
    for _ in range(5):
        injected("two commands on one run")
        both(warm, "run", *words, what="run")
        assert outcome(warm.folder / "outputs/s/r") == outcome(whole)
        shutil.rmtree(warm.folder / "outputs")


def test_one_study_begun_twice(warm: Warm, corpus: Path, injected: Injected) -> None:
    words = tiny(corpus, "--multirun", "model.d_model=8,16,32", "seed=1,2", *SHORT)
    study = warm.folder / "outputs/s"
    succeeded(warm("run", *words))
    undisturbed = study_and_law(study)
    for _ in range(3):
        shutil.rmtree(study)
        injected("two commands on one study")
        both(warm, "run", *words, what="study")
        assert study_and_law(study) == undisturbed


def test_one_cache_filled_twice(warm: Warm, corpus: Path, injected: Injected) -> None:
    words, cache, clean = tiny(corpus, *PREPARED), warm.folder / "cache", warm.folder / "clean"
    succeeded(warm("run", *words, cache=clean))
    for _ in range(5):
        injected("two commands on one cache")
        for command in [warm.start("run", *words, cache=cache) for _ in range(2)]:
            succeeded(command.ended())
        assert files(cache) == files(clean)
        shutil.rmtree(cache)


@pytest.mark.parametrize("at", [3, 6, 12])
def test_who_waits_for_a_cache_goes_on_where_the_other_is_killed(
    warm: Warm, corpus: Path, injected: Injected, at: int
) -> None:
    words, cache, clean = tiny(corpus, *PREPARED), warm.folder / "cache", warm.folder / "clean"
    succeeded(warm("run", *words, cache=clean))
    first = warm.start("run", *words, cache=cache, strike=Strike(cache, at, does=_hang))
    first.wait_until((cache / "hangs").exists)
    second = warm.start("run", *words, cache=cache)
    time.sleep(1.0)
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    injected("SIGKILL of a process that another waits for")
    succeeded(second.ended())
    (cache / "hangs").unlink()
    assert files(cache) == files(clean)


def _hang(folder: Path) -> None:
    (folder / "hangs").touch()
    time.sleep(600)


def test_the_head_of_a_study_is_killed_and_its_workers_are_left(
    warm: Warm, corpus: Path, injected: Injected
) -> None:
    """They end by themselves, and the same command goes on."""
    local = ("launcher=local", "launcher.n_jobs=2", "fit=false")
    words = tiny(corpus, "--multirun", "seed=1,2,3,4", "train.steps=4000", "study=s", *local)
    command = warm.start("run", *words)
    study = warm.folder / "outputs/s"
    command.wait_until(lambda: len(list(study.glob("*/checkpoints/last.ckpt"))) == 2)
    workers = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGKILL)
    injected("SIGKILL of the head of a study")
    command.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert len(list(study.glob("*/run.log"))) == 2
    nothing_torn(study)
    succeeded(warm("run", *words[:-4], *local, "study=s"))


def test_two_laws_fitted_at_once(warm: Warm, corpus: Path, injected: Injected) -> None:
    """Both end well, as they write the same bytes under names that are whole."""
    words = tiny(corpus, "--multirun", "model.d_model=8,16,32", "seed=1,2", *SHORT)
    succeeded(warm("run", *words, "fit=false"))
    command = ("fit", "runs=outputs/s")
    succeeded(warm(*command))
    alone = files(warm.folder / "outputs/s/fit")
    for _ in range(3):
        shutil.rmtree(warm.folder / "outputs/s/fit")
        injected("two commands on one law")
        for one in [warm.start(*command) for _ in range(2)]:
            succeeded(one.ended())
        assert files(warm.folder / "outputs/s/fit") == alone


# --- memory


def short_of_memory() -> None:
    """So much as the process has, and a bit for a small model."""
    limit = psutil.Process().memory_info().vms + 200 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_a_run_that_memory_does_not_suffice_for_says_so(
    warm: Warm, words: list[str], whole: Path, injected: Injected
) -> None:
    ended = warm("run", *words, "model.d_model=8192", "study=t", within=short_of_memory)
    injected("memory exhausted")
    assert ended.code == 1
    assert ended.line.startswith("out of memory: ")
    nothing_torn(warm.folder / "outputs")
    succeeded(warm("run", *words, within=short_of_memory))
    assert outcome(warm.folder / "outputs/s/r") == outcome(whole)


def test_a_job_that_memory_does_not_suffice_for_hides_no_other(
    warm: Warm, corpus: Path, injected: Injected
) -> None:
    words = tiny(corpus, "--multirun", "model.d_model=8,8192,16", *SHORT, "fit=false")
    ended = warm("run", *words, within=short_of_memory)
    injected("memory exhausted")
    assert ended.code == 1
    assert "3 runs: 2 finished, 1 failed" in ended.out
    assert "you tried to allocate" in ended.out
    assert len(list((warm.folder / "outputs/s").glob("*/results.json"))) == 2


# --- Slurm


def as_submitit_does() -> None:
    """What it makes of a signal that the time is up, on the node."""
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import DelayedSubmission, JobPaths
    from submitit.local.local import LocalJobEnvironment

    from tinygpt.sweeping.engines import _SlurmJob

    os.environ["SUBMITIT_LOCAL_JOB_ID"] = "1"
    delayed = DelayedSubmission(_SlurmJob(), ())
    delayed.set_timeout(timeout_min=1, max_num_timeout=3)
    Path("queue").mkdir(exist_ok=True)
    handler = SignalHandler(LocalJobEnvironment(), JobPaths("queue", "1"), delayed)
    signal.signal(signal.SIGTERM, handler.bypass)
    signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_slurm_queues_a_run_again_in_the_middle_of_a_checkpoint(
    warm: Warm, words: list[str], whole: Path, injected: Injected, number: int
) -> None:
    pytest.importorskip("submitit")
    checkpoints = warm.folder / "outputs/s/r/checkpoints"
    for at in (1, 2, 3, 5, 9, 14):  # it is opened, opened again, renamed; once or in a row
        strike = Strike(checkpoints, at, number, "last.ckpt")
        ended = warm("run", *words, strike=strike, within=as_submitit_does)
        injected(f"{signal.Signals(number).name} within a checkpoint")
        assert ended.code != 0
        assert (warm.folder / "queue/1_submitted.pkl").exists() == (number == signal.SIGUSR2)
        nothing_torn(checkpoints)
        if at % 2 == 0:
            succeeded(warm("run", *words))
            assert outcome(checkpoints.parent) == outcome(whole)
            shutil.rmtree(checkpoints.parent)


# --- the clock


def clock_jumps() -> None:
    """Days forth and back, at every look."""
    real, days = time.time, itertools.cycle((1, 3, -2, 0, 9, -40))
    time.time = lambda: real() + 86_400 * next(days)


def test_a_clock_that_jumps(
    warm: Warm, corpus: Path, words: list[str], whole: Path, injected: Injected
) -> None:
    succeeded(warm("run", *words, within=clock_jumps))
    assert outcome(warm.folder / "outputs/s/r") == outcome(whole)
    words = tiny(corpus, "--multirun", "model.d_model=8,16,32", "seed=1,2", *SHORT, "study=t")
    ended = succeeded(warm("run", *words, within=clock_jumps))
    undisturbed = study_and_law(warm.folder / "outputs/t")
    assert not re.search(r"-\d+:", ended.out), ended.out
    injected("clock that jumps")
    injected("clock that jumps")
    shutil.rmtree(warm.folder / "outputs/t")
    succeeded(warm("run", *words))
    assert study_and_law(warm.folder / "outputs/t") == undisturbed


# --- numbers


def not_a_number() -> None:
    """The loss of the fortieth pass is NaN, and with it all that follows."""
    from tinygpt.training.module import LanguageModel

    step, passes = LanguageModel.training_step, iter(range(1, 1000))

    def training_step(self: LanguageModel, *args: object) -> object:
        loss = step(self, *args)  # type: ignore[arg-type]
        return loss * math.nan if next(passes) == 40 else loss

    LanguageModel.training_step = training_step  # type: ignore[assignment,method-assign]


def test_a_nan_on_the_way_is_a_diverged_run(
    warm: Warm, words: list[str], injected: Injected
) -> None:
    injected("NaN")
    run = warm.folder / "outputs/s/r"
    ended = warm("run", *words, within=not_a_number)
    assert ended.code == 1
    assert "diverged: the " in ended.out
    results = json.loads((run / "results.json").read_text())
    assert (results["status"], results["final_val_loss"]) == ("diverged", None)
    nothing_torn(run)
    again = warm("run", *words)
    assert again.code == 1
    assert "already diverged" in again.out


def test_an_exploding_rate_is_a_diverged_run(
    warm: Warm, words: list[str], injected: Injected
) -> None:
    injected("exploding rate")
    rate = ("optim=sgd", "optim.learning_rate=1e9", "train.grad_clip_norm=null")
    assert warm("run", *words, *rate).code == 1
    results = json.loads((warm.folder / "outputs/s/r/results.json").read_text())
    assert results["status"] == "diverged"
