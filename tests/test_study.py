"""``python -m tinygpt.adapt`` with a real model: killed, taken up, swept, reported."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import Command, Starts
from tests.test_adaptation import TIMES, run  # noqa: F401  a fixture
from tinygpt import cli
from tinygpt.adaptation.records import FIELDS, RecordsFile
from tinygpt.adaptation.study import adapt
from tinygpt.fileio import sha256
from tinygpt.trained import TrainedRun

SMALL = (
    "documents.task=new_facts",
    "documents.train=1",
    "documents.tune=1",
    "documents.test=2",
    "documents.forgetting_tokens=300",
    "inner.inner_steps=[1,3]",
    "inner.tokens_per_step=40",
    "inner.lora.rank=4",
    "tuning.learning_rates=[3e-3]",
    "outer.iterations=1",
    "outer.samples=2",
    "outer.steps=3",
    "outer.tokens_per_step=64",
    "policy.max_edit_tokens=10",
    "hardware.threads=1",
    "fit=false",
)


def words_of(run: TrainedRun, cache: Path, folder: Path, *more: str) -> list[str]:  # noqa: F811
    return [f"run={run.path}", *SMALL, f"cache_dir={cache}", f"output_dir={folder}", *more]


def adapted(words: list[str]) -> dict[str, Any]:
    return adapt(cli.compose_for(cli.ADAPT, words), words, Console(quiet=True))


def records(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("adapt.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in RecordsFile(path).read()]


def test_all_methods_leave_their_records_and_the_base_as_it_was(
    run: TrainedRun,  # noqa: F811
    cache: Path,
    tmp_path: Path,
) -> None:
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    before = [sha256(path) for path in files]
    results = adapted(words_of(run, cache, tmp_path))
    assert [sha256(path) for path in files] == before
    found = records(tmp_path)
    assert results["records"] == len(found)
    assert all(record.keys() == set(FIELDS) - set(TIMES) for record in found)
    assert {r["method"] for r in found} == {
        *("none", "lora_doc", "lora_edit", "lora_doc+edit", "oracle", "full_ft_doc"),
        *("restem_it0", "restem_it1"),
    }
    assert {r["split"] for r in found} == {"train", "tune", "test"}
    written = [json.loads(x) for x in next(tmp_path.rglob("edits.jsonl")).read_text().splitlines()]
    replayed = tmp_path / "replayed"
    path = next(tmp_path.rglob("edits.jsonl"))
    words = ["policy=file", f"policy.path={path}", "methods=[lora_edit]", "documents.train=0"]
    words += [w for w in words_of(run, cache, replayed) if not w.startswith("policy.")]
    adapted(words)
    texts = [line["edit"]["text"] for line in written]
    assert all(record["edit"]["text"] in texts for record in records(replayed))


@pytest.mark.slow
def test_a_killed_adaptation_goes_on_to_the_same_records(
    run: TrainedRun,  # noqa: F811
    cache: Path,
    tmp_path: Path,
    tinygpt: Command,
    start: Starts,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    adapted(words_of(run, cache, whole))
    words = words_of(run, cache, killed)
    for wanted in (5, 20, 40):
        process = start("adapt", *words)
        while process.poll() is None:
            lines = sum(len(p.read_bytes().splitlines()) for p in killed.rglob("adapt.jsonl"))
            if lines >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        process.wait()
    done = tinygpt("adapt", *words)
    assert done.returncode == 0, done.stderr
    assert records(killed) == records(whole)
    again = tinygpt("adapt", *words)
    assert "already finished" in again.stdout


@pytest.mark.slow
def test_a_sweep_ends_with_its_report(
    run: TrainedRun,  # noqa: F811
    cache: Path,
    tmp_path: Path,
    tinygpt: Command,
) -> None:
    words = [w for w in words_of(run, cache, tmp_path) if not w.startswith(("fit", "inner.lora"))]
    words += ["experiment=adaptation", "scale=smoke", "launcher=local", "launcher.n_jobs=2"]
    words += ["documents.test=3", "methods=[none,lora_doc,lora_edit,restem]"]
    done = tinygpt("adapt", "--multirun", *words)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "adaptation-smoke"
    assert len(list(study.rglob("adapt.jsonl"))) == 4
    files = {path.name for path in (study / "fit").iterdir()}
    figures = {f"{n}.png" for n in ("adaptation_laws", "pareto_forgetting", "restem")}
    assert files >= {"report.html", "report.md", "adaptation_summary.csv", *figures}
    assert "self-editing" in done.stdout.lower()
    assert (study / "sweep_summary.csv").read_text().count("\n") == 5


def test_forced_it_is_made_anew(run: TrainedRun, cache: Path, tmp_path: Path) -> None:  # noqa: F811
    words = words_of(run, cache, tmp_path, "methods=[none,lora_doc]", "run_name=x")
    adapted(words)
    folder = tmp_path / "adaptation" / "x"
    found, old = records(tmp_path), folder / "fit" / "report.html"
    old.parent.mkdir()
    old.write_text("of before")
    (folder / "environment.json").write_text(
        json.dumps({**json.loads((folder / "environment.json").read_text()), "python": "2"})
    )
    adapted([*words, "force=true"])
    assert records(tmp_path) == found
    assert json.loads((folder / "environment.json").read_text())["python"] != "2"
    assert not old.exists()
    assert (folder / "config.yaml").exists()
