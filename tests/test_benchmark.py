"""``python -m tinygpt.benchmark`` and experiments/speed: what is measured is the same work."""

from __future__ import annotations

import csv
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Command
from tinygpt.config import ConfigError, RunError
from tinygpt.counting import count_parameters
from tinygpt.data.datamodule import TokenData, TrainBatches
from tinygpt.measuring import kernels, results
from tinygpt.measuring.jobs import ENDLESS, Job, Setting, token_folders
from tinygpt.measuring.results import Place, Row
from tinygpt.measuring.statistics import median_interval, quartiles, ratio_interval
from tinygpt.measuring.tokens import open_tokens, write_tokens
from tinygpt.measuring.turns import Arm, Clock, Lap, in_turns, opened
from tinygpt.model.gpt import GPT
from tinygpt.training.session import open_data, open_machine
from tinygpt.training.trainer import Device

SPEED = ROOT / "experiments" / "speed"
MINUTE = (
    *("model=slm_nano", "max_seq_len=16", "vocab_size=300", "batch_size=2"),
    *("rounds=2", "steps=1", "accelerator=cpu"),
)
COLUMNS = [
    *("what", "unit", "clock", "model", "vocab_size", "batch_size", "context", "device"),
    *("precision", "threads", "compile", "matmul", "median", "low", "high", "rounds"),
    *("times_baseline", "times_low", "times_high"),
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the command


PARTS = ("data", "forward", "backward", "optimizer", "framework")
TIMED = {
    *("training", "MFU", "matrix product", "peak memory", *(f"step: {part}" for part in PARTS)),
    *("attention: sdpa", "attention: manual"),
}


def test_measures_are_written_and_compared(tinygpt: Command, tmp_path: Path) -> None:
    done = tinygpt("benchmark", *MINUTE, "measure=train,parts,memory,attention")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    folder = tmp_path / "outputs" / "benchmark"
    files = {f"benchmark.{kind}" for kind in ("csv", "json", "png")}
    assert {path.name for path in folder.iterdir()} == files
    rows = read(folder / "benchmark.csv")
    assert list(rows[0]) == COLUMNS
    assert {row["what"] for row in rows} == TIMED
    for row in rows:
        assert 0 < float(row["low"]) <= float(row["median"]) <= float(row["high"])
    training = [row for row in rows if row["what"] == "training"]
    assert [row["clock"] for row in training] == ["wall", "cpu"]
    words = ("model", "vocab_size", "batch_size", "context", "device", "precision", "threads")
    found = [training[0][name] for name in (*words, "compile", "rounds")]
    assert found == ["slm_nano", "300", "2", "16", "cpu", "32", "1", "off", "2"]
    whole = json.loads((folder / "benchmark.json").read_text())
    assert whole["environment"]["python"]
    assert len(whole["rows"][0]["samples"]) == 2

    again = tinygpt("benchmark", *MINUTE, "measure=attention", f"baseline={folder}")
    assert (again.returncode, again.stderr) == (0, "")
    assert "× baseline" in again.stdout
    for row in read(folder / "benchmark.csv"):
        assert 0 < float(row["times_low"]) <= float(row["times_high"])


@pytest.mark.slow
def test_every_measure(tinygpt: Command, tmp_path: Path) -> None:
    done = tinygpt("benchmark", *MINUTE, "threads=1,2", "output_dir=all")
    assert (done.returncode, done.stderr) == (0, "")
    rows = read(tmp_path / "all" / "benchmark.csv")
    assert {row["what"] for row in rows} == TIMED | {
        *("first step", "generation: cached", "generation: uncached"),
        *(f"tokenizer: {kind}" for kind in ("bpe", "char", "byte")),
    }
    assert {row["threads"] for row in rows if row["what"] == "training"} == {"1", "2"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["modle=tiny"], "modle: no such key; did you mean model"),
        (["model=huge"], "model=huge: no such choice; there are gpt2_small, large"),
        (["model="], "model=: give at least one"),
        (["measure=speed"], "measure=speed: must be one of all, train, parts"),
        (["rounds=0"], "rounds=0: must be at least 1"),
        (["threads=two"], "threads=two: must be an integer"),
        (["compile=often"], "hardware.compile=often: must be one of auto, off"),
        (["baseline=nowhere.json"], "nowhere.json: not a readable JSON file"),
        (["baseline=odd.json"], "baseline=odd.json: not a benchmark.json"),
        (["accelerator=tpu"], "hardware.accelerator=tpu: must be one of"),
    ],
)
def test_a_mistake_is_one_line(
    tinygpt: Command, tmp_path: Path, arguments: list[str], line: str
) -> None:
    (tmp_path / "odd.json").write_text("{}")
    done = tinygpt("benchmark", *arguments)
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert {path.name for path in tmp_path.iterdir()} == {"odd.json"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has it")
def test_what_only_the_other_process_can_know_is_one_line_too(tinygpt: Command) -> None:
    done = tinygpt("benchmark", "accelerator=cuda", "measure=train", "model=tiny")
    assert done.stderr.startswith("error: hardware.accelerator=cuda: this machine")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")


def test_arguments_and_results_need_no_torch() -> None:
    program = (
        "import sys; from tinygpt import benchmark as b; from tinygpt.measuring import figure;"
        "b.settings_of(b.Arguments()); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"torch", "lightning", "transformers"} & set(done.stdout.split())


# --- turns

COUNTING = """
import sys
from tinygpt.config import ConfigError
from tinygpt.measuring.turns import Clock, Player
player, clock = Player(), Clock()
def work(steps):
    print("a library says something")
    if steps == 13:
        raise ZeroDivisionError("unlucky")
    if steps == 14:
        raise ConfigError("threads=14: too many")
    return {"count": clock.lap(steps)}
with player.failing_in_a_line():
    player.serve({"name": sys.argv[1]}, work)
"""


def counting(*names: str) -> dict[str, list[str]]:
    return {name: [sys.executable, "-c", COUNTING, name] for name in names}


def test_processes_take_turns_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    play = Arm.play

    def noted(arm: Arm, steps: int) -> None:
        order.append(arm.name)
        play(arm, steps)

    monkeypatch.setattr(Arm, "play", noted)
    with opened(counting("a", "b")) as arms:
        in_turns(arms, rounds=3, steps=5)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [arm.facts["name"] for arm in arms] == ["a", "b"]
    assert [lap["count"].amount for lap in arms[0].laps] == [5, 5, 5]


def test_a_process_that_fails_says_why() -> None:
    with opened(counting("a")) as (arm,), pytest.raises(RunError, match=r"^a: .*unlucky"):
        arm.play(13)
    with opened(counting("a")) as (arm,), pytest.raises(ConfigError, match="threads=14: too many"):
        arm.play(14)


def test_a_clock_waits_for_the_device_at_each_reading() -> None:
    waits: list[None] = []
    clock = Clock(lambda: waits.append(None))
    clock.start()
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.05:
        pass
    lap = clock.lap(7)
    assert lap.amount == 7
    assert 0.05 <= lap.wall < 5
    assert lap.cpu <= lap.wall * 1.5 + 0.05
    assert len(waits) == 3


# --- numbers


def test_medians_and_their_intervals() -> None:
    assert quartiles([1, 2, 3, 4, 5]) == (3, 2, 4)
    random = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        median, low, high = median_interval(list(random.normal(1.0, 0.1, 30)))
        assert low <= median <= high
        held += low <= 1.0 <= high
    assert 0.88 <= held / 100 <= 0.99
    ratio, low, high = ratio_interval([2.0] * 9, [1.0] * 9)
    assert (ratio, low, high) == (2, 2, 2)


def test_better_is_more_of_a_rate_and_less_of_a_time() -> None:
    place = Place("tiny", 300, 2, 16, "cpu", "32", 1, "off", "torch")

    def rows(factor: float) -> list[Row]:
        rate = Row("training", "tokens/s", "wall", place, [100 * factor])
        return [rate, Row("step: data", "ms", "wall", place, [10 / factor])]

    found = results.against(rows(2), rows(1))
    assert [ratio for ratio, _, _ in found.values()] == pytest.approx([2, 2])


def test_mfu_is_of_the_same_round() -> None:
    class Played:
        def __init__(self, name: str, *laps: Lap) -> None:
            self.laps = [{name: lap} for lap in laps]
            self.facts = {"flops_per_token": 10.0}

    place = Place("tiny", 300, 2, 16, "cpu", "32", 1, "off", "torch")
    slow, fast = Lap(100, 2.0, 1.0), Lap(100, 1.0, 1.0)
    arm: Any = Played("train", slow, fast)
    peak: Any = Played("gemm", Lap(4000, 2.0, 1.0), Lap(4000, 1.0, 1.0))
    wall, _ = results.mfu_rows(arm, peak, place)
    assert wall.samples == pytest.approx([25.0, 25.0])


# --- what is trained


def small(**changes: Any) -> Setting:
    shape = ("model.d_model=16", "model.n_layers=2", "model.n_heads=2")
    more = (*shape, "tokenizer=byte", "logger=csv")
    given = {"vocab_size": 70, "batch_size": 4, "max_seq_len": 16, "more": more, **changes}
    return Setting("tiny", precision="32", accelerator="cpu", threads=1, **given)


def test_random_tokens_are_a_corpus(tmp_path: Path) -> None:
    write_tokens(tmp_path, vocab_size=70, length=16, seed=3)
    config = small().config
    data = open_data(config, open_tokens(tmp_path), open_machine(config))
    assert data.plan is not None
    assert (data.plan.total_steps, data.plan.batch_size) == (ENDLESS, 4)
    batches = TrainBatches(data.splits["train"], data.windows, length=16, seed=1, plan=data.plan)
    inputs, targets = batches[0]
    assert inputs.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 70
    assert len(data.eval_batches("val", 4)) == 1


def test_the_trainer_is_stopped_after_so_many_steps() -> None:
    with token_folders() as tokens_of:
        setting = small()
        job = Job("train", setting.overrides, tokens_of(setting))
        with opened({"train": job.command}) as (train,):
            in_turns([train], rounds=2, steps=12)
    assert [laps["train"].amount for laps in train.laps] == [12 * 4 * 16] * 2
    assert train.facts["parameters"] == count_parameters(setting.config.model, 70).total
    assert train.last["peak_bytes"] > 0


def test_attention_and_products_are_counted() -> None:
    config, device = small().config, Device("cpu", "bf16-mixed")
    laps = kernels.attention(config, device, Clock())(2)
    assert {name: lap.amount for name, lap in laps.items()} == {"sdpa": 2, "manual": 2}
    assert kernels.dtype_of(device) == torch.bfloat16


# --- experiments/speed


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its ``arms``, as its own scripts import it."""
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module("arms")


def loops(speed: ModuleType, data: TokenData, config: Any, names: tuple[str, ...]) -> list[Any]:
    """Each rival, fed with the same batches of tinygpt's own order."""
    assert data.plan is not None
    batches = TrainBatches(
        data.splits["train"], data.windows, length=16, seed=config.seed, plan=data.plan
    )

    def fed() -> Any:
        numbers = iter(range(ENDLESS))
        return lambda: tuple(part.contiguous() for part in batches[next(numbers)])

    recipe = speed.recipe_of(config, data.plan.total_steps, data.plan.warmup_steps)
    return [speed.LOOPS[name](config, data, fed(), recipe) for name in names]


def test_the_rivals_do_the_same_work(speed: ModuleType, tmp_path: Path) -> None:
    """The same weights in, the same loss out; and for plain and raw the same after training."""
    write_tokens(tmp_path, vocab_size=70, length=16, seed=3)
    config = small(more=(*small().more, "schedule.warmup_steps=2")).config
    data = open_data(config, open_tokens(tmp_path), open_machine(config))
    assert data.plan is not None
    tokens = torch.from_numpy(data.splits["train"].gather(np.arange(4) * 16, 17))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    torch.manual_seed(config.seed)
    ours = GPT(config.model, 70)
    names = ("plain", "transformers", "raw")
    found = loops(speed, data, config, names)

    with torch.no_grad():
        before = float(ours(inputs, targets))
        for _, loss_of, model in found:
            assert float(loss_of(inputs, targets)) == pytest.approx(before, abs=1e-5)
            assert sum(p.numel() for p in model.parameters()) == sum(
                p.numel() for p in ours.parameters()
            )
    for loop, _, _ in found:
        for _ in range(5):
            next(loop)
    with torch.no_grad():
        plain, transformers, raw = (float(loss_of(inputs, targets)) for _, loss_of, _ in found)
    assert plain == pytest.approx(raw, abs=1e-5)
    assert transformers == pytest.approx(raw, abs=0.02)  # its labels are one target fewer
    assert abs(raw - before) > 1e-3


def test_the_plain_loops_rate_is_ours(speed: ModuleType) -> None:
    from tinygpt.training.optim import rate_factor

    config = small().config
    recipe = speed.recipe_of(config, 100, 10)
    plain = importlib.import_module("plain")
    for step in (0, 5, 9, 10, 50, 99):
        factor = rate_factor(step, config.schedule, total_steps=100, warmup_steps=10)
        wanted = config.optim.learning_rate * factor
        assert math.isclose(plain.rate(step, recipe), wanted, rel_tol=1e-12)


@pytest.mark.slow
def test_the_comparison_runs(tmp_path: Path) -> None:
    def compare(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SPEED / "compare.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    work = ("batch_size=2", "max_seq_len=16", "vocab_size=300", "steps=2", "rounds=3")
    done = compare(*work, f"output_dir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "CPU second" in done.stdout
    rows = read(tmp_path / "results.csv")
    assert [(row["rival"], row["clock"]) for row in rows] == [
        (rival, clock) for rival in ("plain", "transformers") for clock in ("cpu", "wall")
    ]
    assert (tmp_path / "speed.png").exists()
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["cases"][0]["ratios"]) == 3
    done = compare("overhead=true", "rounds=2")
    assert (done.returncode, done.stdout.count("ms (95 %")) == (0, 2), done.stderr
    done = compare("model=huge")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
