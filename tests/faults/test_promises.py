"""What is finished stays as it is, can be traced, and comes out the same again, byte for byte."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.conftest import tiny
from tests.faults.conftest import succeeded
from tests.faults.test_kills import SHORT, files
from tests.faults.warm import Warm
from tests.test_resume import MEASURED
from tinygpt import fileio
from tinygpt.runs import rundir

SWEEP = ("--multirun", "model.d_model=8,16,32", "seed=1,2", *SHORT)


def test_no_command_changes_a_finished_run(warm: Warm, corpus: Path) -> None:
    words = tiny(corpus, *SWEEP)
    succeeded(warm("run", *words))
    study = warm.folder / "outputs/s"
    run = next(study.glob("*/results.json")).parent
    before = files(study)
    for command in (
        ("run", *words),
        ("run", *words, "launcher=local", "launcher.n_jobs=1"),
        ("run", *tiny(corpus, "model.d_model=8", "seed=1", *SHORT)),
        ("fit", "runs=outputs/s"),
        ("export", f"run={run}", "to=exported"),
    ):
        succeeded(warm(*command))
        assert files(study) == before, command
    other = warm("run", *tiny(corpus, *SHORT), f"run_name={run.name}", "optim.learning_rate=0.5")
    assert other.code == 2
    assert "holds a run of another configuration" in other.line
    assert files(study) == before


def test_a_result_is_traced_to_its_folder_its_code_and_its_configuration(
    warm: Warm, corpus: Path
) -> None:
    """From the table of a report, with nothing but what stands in the files."""
    from tinygpt.data.corpora import open_corpus
    from tinygpt.data.shards import load_index
    from tinygpt.runs import pretrained

    succeeded(warm("run", *tiny(corpus, *SWEEP)))
    with (warm.folder / "outputs/s/fit/runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    indices = [load_index(path.parent) for path in warm.cache.glob("data/*/index.json")]
    trained_on = {index["splits"]["train"]["fingerprint"] for index in indices if index}
    for row in rows:
        run = rundir.RunDir(warm.folder / row["folder"])
        results, begun = fileio.read_json(run.results), fileio.read_json(run.environment)
        assert row["final_val_loss"] == str(results["final_val_loss"])
        assert row["config_hash"] == results["config_hash"] == begun["config_hash"]
        assert (
            row["git_commit"] == str(results["git_commit"] or "") == str(begun["git_commit"] or "")
        )
        assert set(begun["packages"]) >= {"tinygpt", "torch", "numpy", "tokenizers"}
        config = rundir.read_config(run.config)
        content = pretrained.contents(open_corpus(config.data), config)
        assert rundir.config_hash(config, content) == row["config_hash"]
        assert row["data_fingerprint"] in trained_on


def test_the_same_again_is_the_same_to_the_byte(warm: Warm, tmp_path: Path, corpus: Path) -> None:
    other = Warm(tmp_path / "other", tmp_path / "other-cache")
    words = tiny(corpus, *SWEEP, "tokenizer=bpe", "tokenizer.vocab_size=300", "fit=false")
    found = []
    for one in (warm, other):
        cache = one.folder / "cache"
        succeeded(one("run", *words, cache=cache))
        study = one.folder / "outputs/s"
        run = sorted(study.glob("*/results.json"))[0].parent
        succeeded(one("export", f"run={run}", "to=exported"))
        found.append((files(cache), files(one.folder / "exported"), _lasting(study)))
    assert found[0] == found[1]


def test_a_report_on_the_same_runs_is_the_same_to_the_byte(warm: Warm, corpus: Path) -> None:
    succeeded(warm("run", *tiny(corpus, *SWEEP)))
    fit = warm.folder / "outputs/s/fit"
    by_the_sweep = files(fit)
    for _ in range(2):
        succeeded(warm("fit", "runs=outputs/s"))
        assert files(fit) == by_the_sweep


def _lasting(study: Path) -> dict[str, object]:
    """Every file of a study, without what time and host decide in it."""
    lasting: dict[str, object] = {}
    for name, data in files(study).items():
        if name.endswith("results.json"):
            results = json.loads(data)
            lasting[name] = {k: v for k, v in results.items() if k not in MEASURED}
        elif name.endswith("metrics.csv"):
            rows = csv.DictReader(data.decode().splitlines())
            lasting[name] = [{k: v for k, v in r.items() if k not in MEASURED} for r in rows]
        elif (
            not name.endswith((".ckpt", "run.log", "config.yaml", ".csv")) and "sweep_" not in name
        ):
            lasting[name] = data
    return lasting
