"""A law within a budget: which runs are chosen, what is predicted before, what survives a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tinygpt import law
from tinygpt.config import ConfigError
from tinygpt.scaling.design import Design, spend
from tinygpt.scaling.laws import sum_of_powers
from tinygpt.sweeping import budget, recipe
from tinygpt.sweeping.engines import Share
from tinygpt.sweeping.jobs import Job
from tinygpt.sweeping.kinds import TRAINING
from tinygpt.sweeping.recipe import Asked
from tinygpt.sweeping.record import Record
from tinygpt.sweeping.workers import Outcome

LAWS = ("chinchilla", "coupled")
FLOPS = 6e12  # of a simulated study


# --- which run tells most


def pool(noise: float = 0.0) -> tuple[pd.DataFrame, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Runs of eight sizes and eight lengths: their places, losses and costs."""
    n, d = (
        axis.ravel() for axis in np.meshgrid(np.geomspace(1e4, 1e6, 8), np.geomspace(1e5, 1e7, 8))
    )
    loss = 1.5 + 40 / n**0.4 + 200 / d**0.4
    random = np.random.default_rng(0)
    return (
        pd.DataFrame({"N": n, "D": d}),
        loss * np.exp(noise * random.standard_normal(64)),
        6 * n * d,
    )


def made(noise: float = 0.003) -> Design:
    places, _, cost = pool()
    return Design(places, pd.DataFrame({"N": [4e6], "D": [4e7]}), cost, cost, LAWS, noise)


@pytest.mark.parametrize("pending", [[], [3], [3, 60, 7]])
def test_what_a_run_tells_is_the_variance_that_it_takes_away(pending: list[int]) -> None:
    """Against the variance that is left when the run counts as made."""
    design = made()
    gain, now = design.expect(pending)
    for row in (0, 21, 63):
        _, then = design.expect([*pending, row])
        assert now - then == pytest.approx(gain[row], rel=1e-6)
    assert gain.min() >= 0
    assert (gain[pending] == 0).all()


def test_a_second_seed_tells_less_the_less_seeds_scatter() -> None:
    places, _, cost = pool()
    twice, costs = pd.concat([places, places], ignore_index=True), np.tile(cost, 2)
    left = []
    for noise in (0.001, 0.1):
        design = Design(twice, pd.DataFrame({"N": [4e6], "D": [4e7]}), costs, costs, LAWS, noise)
        before, _ = design.expect()
        after, _ = design.expect([5])
        left.append(after[64 + 5] / before[5])
    assert left[0] < left[1] / 10


def test_a_twentieth_of_the_cost_predicts_beyond_the_pool() -> None:
    places, losses, cost = pool(noise=0.002)
    design = Design(places, pd.DataFrame({"N": [4e6], "D": [4e7]}), cost, cost, LAWS, 0.002)
    asked: list[int] = []

    def run(row: int) -> float:
        asked.append(row)
        return float(losses[row])

    found = spend(design, 0.05 * cost.sum(), run)
    assert found.rows == asked == list(dict.fromkeys(asked))  # each is paid for once
    assert found.cost == pytest.approx(cost[asked].sum())
    assert found.cost <= 0.05 * cost.sum()
    truth = 1.5 + 40 / 4e6**0.4 + 200 / 4e7**0.4
    assert abs(found.predicted[0] / truth - 1) < 0.01
    assert abs(math.log(found.predicted[0] / truth)) < found.half_widths[0]


def test_a_budget_for_too_few_runs_is_said() -> None:
    places, losses, cost = pool()
    design = Design(places, places.iloc[-1:] * 2, cost, cost, LAWS)
    with pytest.raises(ConfigError, match=r"pays for \d runs, too few for a law"):
        spend(design, 5 * cost.min(), lambda row: float(losses[row]))


def test_a_law_of_your_own_may_have_any_variables() -> None:
    """Here of a mixture of experts: their number and the dense size."""
    law = sum_of_powers(
        "experts", "L = E + A / (N^a X^b)", "a test", {"E": {}, "A": {"N": "a", "X": "b"}}
    )
    n, x = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e8, 6), [2, 4, 8, 16, 32, 64]))
    pool = pd.DataFrame({"N": n, "X": x.astype(float)})
    target = pd.DataFrame({"N": [1e9], "X": [128.0]})
    design = Design(pool, target, n * x, n * x, [law])
    found = spend(design, 0.2 * (n * x).sum(), lambda i: 1.5 + 90 / n[i] ** 0.3 / x[i] ** 0.2)
    assert found.predicted[0] == pytest.approx(1.5 + 90 / 1e9**0.3 / 128**0.2, rel=0.01)
    with pytest.raises(ConfigError, match="law coupled: is one of tinygpt's own"):
        Design(pool, target, n, n, [dataclasses.replace(law, name="coupled")])


# --- a study on simulated losses


class Machine:
    """Does jobs in no time: the loss is that of a law; a few rows go wrong as told."""

    def __init__(self, wrong: dict[int, str] | None = None, kill_after: int = 10**9) -> None:
        self.wrong, self.kill_after = wrong or {}, kill_after
        self.trained: list[str] = []
        self.flops: dict[str, float] = {}
        self.lasting = 2.0  # passes after which most of what repeating gives is had

    def __call__(self, jobs: Iterable[Job], folder: Path) -> Iterator[tuple[Job, Outcome]]:
        for job in jobs:
            if len(self.trained) >= self.kill_after:
                raise KeyboardInterrupt
            number, name = len(self.trained), job.run.path.name
            self.trained.append(name)
            self.flops[name] = job.row["flops_exact"]
            if number in self.wrong:
                yield job, Outcome(self.wrong[number], reason="as told")
                continue
            n, d = job.row["parameters_non_embedding"], job.row["train_tokens"]
            chance = np.random.default_rng([n, d, job.config.seed]).standard_normal()
            unique = job.row["unique_train_tokens"]  # Muennighoff's law of repeated data
            d = unique * (1 + self.lasting * (1 - np.exp((1 - d / unique) / self.lasting)))
            loss = float((1.5 + 20 / n**0.4 + 60 / d**0.4) * np.exp(0.003 * chance))
            job.run.path.mkdir(parents=True, exist_ok=True)
            job.run.results.write_text(json.dumps({"final_val_loss": loss}))
            yield job, Outcome("finished", loss)

    @contextlib.contextmanager
    def ready(self, jobs: Any, study: int = 0) -> Iterator[tuple[Share, Machine]]:
        yield Share("serial", 1, 1), self


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [f"{one}{other}" for one in "abcdefg" for other in "aeiou"]
    random = np.random.default_rng(0)
    lines = (" ".join(random.choice(words, 12)) + "." for _ in range(9000))
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def whole(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Machine, list[dict[str, Any]]]:
    """The folder of a study in which nothing went wrong, its machine and its record."""
    folder, machine = tmp_path_factory.mktemp("whole"), Machine()
    with pytest.MonkeyPatch.context() as monkeypatch:
        lines = find(text, folder, machine, monkeypatch)
    return folder, machine, lines


def find(
    text: Path, folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, **asked: Any
) -> list[dict[str, Any]]:
    """Run a study on the simulated machine; return its record."""
    monkeypatch.setattr(recipe, "SEEDS", 2)
    monkeypatch.setattr(recipe, "LENGTHS", 4)
    monkeypatch.setattr(budget, "ready", machine.ready)
    monkeypatch.setattr(TRAINING, "fit", lambda *_: None)
    monkeypatch.setattr(budget, "write_summary", lambda *_: None)
    words = ["data=custom", f"data.path={text}", f"output_dir={folder}", "hardware=cpu"]
    words.append(f"cache_dir={text.parent / 'cache'}")
    about = {"minutes": None, "flops": FLOPS, **asked}
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        budget.find_law(Asked(words, "law", **about), str(folder), Console(file=nowhere))
    return record(folder)


def record(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "law" / "design.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in line.items() if k not in ("at", "written", "seconds")} for line in found
    ]


def decisions(lines: list[dict[str, Any]]) -> list[str]:
    return [line["run"] for line in lines if line["event"] == "choose"]


def test_a_study_predicts_what_it_then_measures(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
) -> None:
    folder, machine, lines = whole
    prediction = json.loads((folder / "law" / "prediction.json").read_text())
    rates, chosen = 4, decisions(lines)
    assert machine.trained[rates : rates + len(chosen)] == chosen
    assert set(prediction["from_runs"]) == set(chosen)  # and so none of those that test it
    tests = machine.trained[rates + len(chosen) :]
    assert len(tests) == len(prediction["seeds"]) == 1
    assert not set(tests) & set(chosen)
    (loss,) = lines[-1]["losses"].values()
    assert lines[-1]["inside"] == [prediction["low"] <= loss <= prediction["high"]]
    assert lines[-1]["error"] == pytest.approx(prediction["predicted"] / loss - 1)
    assert abs(lines[-1]["error"]) < 0.02
    costs = [line["cost"] for line in lines if line["event"] == "choose"]
    assert sum(costs) <= 0.75 * FLOPS
    assert prediction["flops"] <= 0.25 * FLOPS
    flops = [machine.flops[name] for name in machine.trained]
    assert flops[-1] == max(flops) > max(flops[:-1])


class Clock(Machine):
    """Does two jobs at once, on a clock of its own: a step takes as long as its FLOPs say."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.busy = 0.0, 0.0

    def __call__(self, jobs: Iterable[Job], folder: Path) -> Iterator[tuple[Job, Outcome]]:
        waiting, running = iter(jobs), list[tuple[float, Job]]()
        while True:
            while len(running) < 2 and (job := next(waiting, None)) is not None:
                took = 1.0 + seconds(job) * (job.steps + 100)
                self.busy += took
                running.append((self.now + took, job))
            if not running:
                return
            self.now, job = running.pop(running.index(min(running, key=lambda one: one[0])))
            yield from super().__call__([job], folder)

    @contextlib.contextmanager
    def ready(self, jobs: Any, study: int = 0) -> Iterator[tuple[Share, Machine]]:
        yield Share("local", 2, 1), self


def seconds(job: Job) -> float:
    """Return the seconds of an optimizer step on the simulated clock."""
    return float(job.row["flops_per_token"] * job.row["batch_tokens"]) / 5e9


def test_of_two_workers_one_goes_on_beside_the_test(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(recipe, "step_cost", lambda _, job: seconds(job))
    monkeypatch.setattr(Record, "elapsed", lambda _: clock.now)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: clock.now))
    lines = find(text, tmp_path, clock, monkeypatch, minutes=10.0, flops=None)
    said = json.loads((tmp_path / "law" / "prediction.json").read_text())
    chosen = decisions(lines)
    beside = [name for name in chosen if name not in said["from_runs"]]
    assert 250 < said["seconds"] < 300
    assert beside
    assert set(said["from_runs"]) == set(chosen[: -len(beside)])
    (test,) = (line for line in lines if line["event"] == "test")
    assert test["loss"] == lines[-1]["loss"]
    assert abs(lines[-1]["error"]) < 0.02
    assert max(clock.flops.values()) == said["flops"]  # and it took longest
    assert 500 < clock.now < 600
    assert clock.busy > 0.85 * 2 * clock.now


@pytest.mark.parametrize(
    ("workers", "long", "short"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 3), (6, 3, 3), (64, 3, 3)],
)
def test_a_quarter_of_the_budget_at_most_goes_into_the_test(
    workers: int, long: int, short: int
) -> None:
    share, asked = Share("local", workers, 1), Asked([], "law", 10.0, None)
    cost = asked.test_cost(share)
    assert cost == (300 if workers > 1 else 150)  # half of the time of one worker, at most
    assert asked.tests(share, cost) == long
    assert long * cost <= 0.25 * workers * 600
    assert asked.tests(share, 30.0) == short  # all that the text allows: seeds say more
    of_flops = Asked([], "law", None, 1e15)
    assert of_flops.test_cost(share) == 0.25e15
    assert of_flops.tests(share, 0.1e15) == 1


def test_a_shorter_run_costs_only_its_decay(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
) -> None:
    """A longer run of its size and seed has left its state where the decay of a shorter begins."""
    lines = whole[2]
    batch, branches = lines[0]["recipe"]["batch_tokens"], 0
    runs, longest = dict[int, tuple[tuple[int, int], int]](), dict[tuple[int, int], int]()
    for line in lines:
        if line["event"] == "choose":
            found = re.search(r"d_model-(\d+).*seed-(\d+).*tokens-(\d+)", line["run"])
            assert found
            width, seed, tokens = (int(part) for part in found.groups())
            runs[line["row"]] = (width, seed), tokens
            if longest.get((width, seed), 0) > tokens:
                assert 0.75 < line["branch_step"] / (tokens // batch) < 0.85
                branches += 1
        elif line["event"] == "end":
            family, tokens = runs[line["row"]]
            longest[family] = max(tokens, longest.get(family, 0))
    assert branches


def test_the_prediction_does_not_hang_on_what_it_predicts(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test diverges, and the same was predicted."""
    folder, machine, _ = whole
    poisoned = Machine(wrong={len(machine.trained) - 1: "diverged"})
    with pytest.raises(RuntimeError, match="the test failed: as told"):
        find(text, tmp_path, poisoned, monkeypatch)
    one, other = (
        json.loads((place / "law" / "prediction.json").read_text()) for place in (folder, tmp_path)
    )
    for said in (one, other):
        del said["made"], said["seconds"]
    assert one == other


@pytest.mark.parametrize("after", [2, 9])
def test_a_killed_study_takes_the_same_decisions(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    killed = Machine(kill_after=after)
    with pytest.raises(KeyboardInterrupt):
        find(text, tmp_path, killed, monkeypatch)
    path = tmp_path / "law" / "design.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "cho')  # torn
    again = find(text, tmp_path, Machine(), monkeypatch)
    assert again[1:] == whole[2][1:]  # the first names the folders


def test_a_study_that_an_earlier_version_finished_trains_nothing(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its record has no line for each run of the test."""
    shutil.copytree(whole[0] / "law", tmp_path / "law")
    path = tmp_path / "law" / "design.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["asked"]["overrides"][2] = f"output_dir={tmp_path}"
    old = [json.dumps(line) + "\n" for line in lines if line["event"] != "test"]
    path.write_text("".join(old))
    machine = Machine()
    find(text, tmp_path, machine, monkeypatch)
    assert machine.trained == []
    assert len(path.read_text().splitlines()) == len(old)


def test_a_text_read_several_times_has_the_law_of_repeated_data(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small.txt"
    small.write_text(text.read_text()[:100_000])
    lines = find(small, tmp_path, Machine(), monkeypatch, flops=5e12)
    prediction = json.loads((tmp_path / "law" / "prediction.json").read_text())
    assert lines[0]["recipe"]["repeats"]
    assert prediction["tokens"] > 4 * lines[0]["recipe"]["one_pass"]
    assert "data_constrained" in prediction["laws"]
    assert abs(lines[-1]["error"]) < 0.02


def test_another_seed_is_another_study(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine()
    find(text, tmp_path, machine, monkeypatch, seed=7)
    assert not set(machine.trained) & set(whole[1].trained)
    with pytest.raises(ConfigError, match="begun with other keys"):
        find(text, tmp_path, Machine(), monkeypatch)


def test_what_goes_wrong_is_recorded_and_not_chosen_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = find(text, tmp_path, Machine(wrong={6: "diverged", 9: "killed"}), monkeypatch)
    wrong = [line for line in lines if line["event"] == "end" and line["loss"] is None]
    assert [line["status"] for line in wrong] == ["diverged", "killed"]
    assert len(set(decisions(lines))) == len(decisions(lines))
    assert lines[-1]["event"] == "score"


def test_it_stops_once_the_target_is_known_well_enough(
    whole: tuple[Path, Machine, list[dict[str, Any]]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halves = [line["half"] for line in whole[2] if line["event"] == "end" and line["half"]]
    lines = find(text, tmp_path, Machine(), monkeypatch, error=1.01 * halves[0])
    assert len(decisions(lines)) < len(decisions(whole[2]))


def test_a_budget_too_small_is_one_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"^the budget is too small for a law of this text; it ta"
    ):
        find(text, tmp_path / "a", Machine(), monkeypatch, flops=1e9)
    assert not (tmp_path / "a").exists()


def test_a_text_too_small_is_one_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small.txt"
    small.write_text(text.read_text()[:45_000].replace("\n\n", "\n<|endoftext|>\n"))
    with pytest.raises(ConfigError, match=r"^the text has \S+ training tokens; a law needs"):
        find(small, tmp_path / "a", Machine(), monkeypatch)


# --- rules and words


def test_a_sweep_of_rates_takes_the_valley() -> None:
    rates = {rate: 2.0 + (math.log(rate) - math.log(3e-3)) ** 2 for rate in budget.RATES}
    assert budget.best_rate(rates) == 0.003
    assert budget.best_rate({0.001: 2.0, 0.002: 2.1, 0.004: 2.3}) == 0.001  # an edge


def test_sizes_suit_the_longest_run() -> None:
    sizes = [12 * width**2 for width in recipe.WIDTHS]
    small = recipe._amid(list(recipe.WIDTHS), [n / 300_000 for n in sizes])
    large = recipe._amid(list(recipe.WIDTHS), [n / 300_000_000 for n in sizes])
    assert small == list(recipe.WIDTHS[:7])
    assert 512 in large
    assert len(large) == 7
    dear = recipe._amid(list(recipe.WIDTHS), [n**2 / 3e13 for n in sizes])  # tokens cost more there
    assert max(dear) < max(large)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("minutes=5", "path: give a text"),
        ("path={text} data=tinystories", "path, data=tinystories: give one of them"),
        ("path={text} minutes=5 flops=1e15", "minutes, flops: give one of them"),
        ("path={text} minutes=0", "minutes=0.0: must be above 0"),
        ("path={text} seed=-3", "seed=-3: must be at least 0"),
        ("path={text} schedule=cosine", "schedule=cosine: tinygpt.law needs schedule=wsd"),
        ("path={text} train.tokens=5", "train.tokens=5: tinygpt.law decides this"),
        ("path={text} modle=tiny", "modle: no such key"),
        ("path=nope.txt", "nope.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(
    words: str,
    line: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*words.format(text=text).split(), f"output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["law", *given])
    with pytest.raises(SystemExit) as left:
        law.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said
    assert not (tmp_path / "out").exists()


def test_law_is_a_command() -> None:
    arguments, given = law.read(
        ["path=a.txt,b.txt", "minutes=3", "target.flops=1e15", "tokenizer=bpe"]
    )
    assert arguments.path == ["a.txt", "b.txt"]
    assert arguments.target.flops == 1e15
    assert given == [
        "tokenizer=bpe",
        "data=custom",
        "data.path=[a.txt,b.txt]",
        "output_dir=outputs",
    ]


@pytest.mark.slow
def test_a_killed_study_ends_as_if_it_had_not_been(tmp_path: Path, text: Path) -> None:
    """Real runs, killed with their study at four moments: the same decisions and the same bits."""
    words = [f"path={text}", "flops=1.5e12", "launcher=serial", "hardware=cpu"]
    program = [sys.executable, "-m", "tinygpt.law", *words, f"cache_dir={tmp_path / 'cache'}"]
    chance = random.Random(0)

    def start(name: str, seconds: float | None = None) -> bool:
        """Return whether the study ended by itself."""
        command = [*program, f"output_dir={tmp_path / name}", "study=law"]
        with open(tmp_path / f"{name}.log", "a", encoding="utf-8") as log:
            study = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                assert study.wait(seconds) == 0, (tmp_path / f"{name}.log").read_text()
            except subprocess.TimeoutExpired:
                os.killpg(study.pid, signal.SIGKILL)
                study.wait()
                return False
            return True

    assert start("whole")
    for _ in range(4):
        if start("killed", chance.uniform(10, 25)):
            break
    else:
        assert start("killed")
    assert record(tmp_path / "killed")[1:] == record(tmp_path / "whole")[1:]
    losses = [
        {path.parent.name: json.loads(path.read_text())["final_val_loss"] for path in found}
        for found in (
            (tmp_path / name / "law").glob("*/results.json") for name in ("whole", "killed")
        )
    ]
    assert losses[0] == losses[1]
    assert (tmp_path / "killed" / "law" / "fit" / "report.html").exists()
