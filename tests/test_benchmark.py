"""``python -m tinygpt.benchmark``: the numbers of its table, its files and its one-line errors."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tinygpt import benchmark, cli, measuring
from tinygpt.model.gpt import GPT
from tinygpt.training.module import LanguageModel

TINY = (
    *("model=slm_nano", "model.max_seq_len=16", "train.batch_tokens=64", "tokenizer=byte"),
    *("data.max_tokens=20_000", "data.eval_tokens=1_000", "hardware.accelerator=cpu"),
    *("hardware.threads=1", "logger=csv"),
)
OF_MODEL = {
    *("parameters", "tokens per step", "training", "training step", "training FLOPs"),
    *("matrix product", "MFU", "peak memory", "bare step", "forward", "forward+backward"),
    *("generation", "tokenization"),
}
OF_LIGHTNING = {"Trainer's step", "bare step", "Lightning's part"}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Has the benchmark measure here, where torch is loaded already."""

    real = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[1:3] != ["-m", "tinygpt.measuring"]:
            return real(command, **options)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", command[2:])
            measuring.main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))


def test_the_table_is_of_what_was_measured(
    in_this_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*TINY, "steps=5", "seconds=0.02", f"output_dir={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    benchmark.main()
    printed = capsys.readouterr().out.splitlines()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"BENCH.md", "bench.csv"}
    with (tmp_path / "out" / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == benchmark.COLUMNS
    value = {(row["model"], row["measure"]): float(row["median"]) for row in rows}
    assert set(value) == {
        *(("slm_nano", name) for name in OF_MODEL),
        *(("minimal", name) for name in OF_LIGHTNING),
    }

    # the printed table and BENCH.md are the rows of the CSV
    page = (tmp_path / "out" / "BENCH.md").read_text().splitlines()
    head = next(i for i, line in enumerate(printed) if line.startswith("model "))
    assert page[2].split() == " ".join(printed[:head]).split()
    assert f"torch {torch.__version__}" in page[2]
    assert page[4] == f"    python -m tinygpt.benchmark {' '.join(words)}"
    shown = [line.strip("| ").split(" | ") for line in page[8:]]
    wanted = []
    for row in rows:
        numbers = {name: float(row[name]) for name in ("median", "low", "high")}
        assert numbers["low"] <= numbers["median"] <= numbers["high"]
        assert row["threads"] == "1"
        whole = row | numbers | {"samples": int(row["samples"])}
        wanted.append([cell for cell in benchmark.cells(whole) if cell])
    assert [[cell for cell in map(str.strip, line) if cell] for line in shown] == wanted
    assert [line.split() for line in printed[head + 1 :][: len(rows)]] == [
        " ".join(line).split() for line in wanted
    ]
    assert max(map(len, printed[:-1])) <= 80

    # against what the model itself says
    of = {name: value["slm_nano", name] for name in OF_MODEL}
    config = cli.compose_config(TINY).model
    model = GPT(config, 258)
    assert of["parameters"] == sum(p.numel() for p in model.parameters())
    products = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    products -= config.max_seq_len * config.d_model  # positions are only looked up
    attention = 2 * config.n_layers * config.max_seq_len * config.d_model
    flops = of["tokens per step"] * 6 * (products + attention)
    seconds = of["training step"] / 1e3
    assert of["training"] * seconds == pytest.approx(64)
    assert of["training FLOPs"] * 1e9 * seconds == pytest.approx(flops)
    assert of["MFU"] == pytest.approx(100 * of["training FLOPs"] / of["matrix product"])
    assert 0 < of["MFU"] < 100
    assert 100 < of["peak memory"] < 100_000

    # against a clock of our own, with much room for a busy machine
    tokens = torch.zeros(4, 16, dtype=torch.long)
    begun = time.perf_counter()
    for _ in range(10):
        model(tokens, tokens)
    forward = 100 * (time.perf_counter() - begun)
    assert forward / 10 < of["forward"] < forward * 10
    assert of["forward"] < 2 * of["forward+backward"]
    steps = (value["minimal", "Trainer's step"], value["minimal", "bare step"])
    assert value["minimal", "Lightning's part"] == pytest.approx(steps[0] - steps[1], abs=3)


def test_the_bare_loop_does_the_work_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """From the same weights it comes to the same weights."""
    made: list[LanguageModel] = []

    def seeded(*arguments: Any) -> LanguageModel:
        torch.manual_seed(0)
        made.append(LanguageModel(*arguments))
        return made[-1]

    monkeypatch.setattr(measuring, "LanguageModel", seeded)
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))
    overrides = benchmark.jobs(benchmark.Arguments(steps=1), [])["minimal"]
    bench = measuring.Bench(cli.compose_config([*overrides, f"output_dir={tmp_path}"]), 0.01)
    before = made[0].model.token_embedding.weight.clone()
    rows = list(bench.overhead())
    assert {row["measure"] for row in rows} == OF_LIGHTNING
    assert {row["samples"] for row in rows} == {19}  # of 20 steps the first warms up
    bare, trained = (dict(module.model.named_parameters()) for module in made)
    for name in bare:
        torch.testing.assert_close(bare[name], trained[name], rtol=0, atol=1e-6)
    assert not torch.equal(before, bare["token_embedding.weight"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["modle=tiny"], "modle: no such key; did you mean model"),
        (["model=huge"], "model=huge: no such choice; there are gpt2_small, large"),
        (["model="], "model=: give at least one"),
        (["seconds=0"], "seconds=0.0: must be at least 0.001"),
        (["train.steps=9"], "train.steps=9: not a key of the benchmark; the benchmark sets it"),
        # what earlier versions had
        (["measure=train"], "measure=train: not a key of the benchmark; everything is measured; s"),
        (["rounds=3"], "rounds=3: not a key of the benchmark; steps= says how many training"),
        (["baseline=old"], "baseline=old: not a key of the benchmark; compare the bench.csv"),
        (["batch_size=8"], "batch_size=8: no such key; did you mean train.batch_tokens=8*L"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    monkeypatch.setattr(benchmark, "measure", None)
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    shown = capsys.readouterr()
    assert (left.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "wanted", "line"),
    [(2, 2, ""), (-9, 1, "error: model=tiny: signal 9 ended it; out of memory?\n")],
)
def test_a_process_that_fails_is_told(
    code: int,
    wanted: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    shown = capsys.readouterr()
    assert (left.value.code, shown.err) == (wanted, line)
    assert list(tmp_path.iterdir()) == []
