"""Nine configurations train to the losses of ff2412f; how a batch is cut up changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.guards.commands import OLD, column, read_metrics, read_results, read_weights, succeed

pytestmark = pytest.mark.filterwarnings("default")

RECORDED: dict[str, Any] = json.loads((OLD / "losses.json").read_text())["runs"]
# Runs whose numbers changed on purpose after ff2412f, and why.
CHANGED = {"dropout": "ed89061: what is dropped became a function of seed, step and sequence"}


def train(name: str, *more: str) -> Path:
    """Train a recorded configuration, with ``more`` keys, and return the folder of the run."""
    words = [*RECORDED[name]["overrides"], "study=losses", f"run_name={name}", *more]
    words.append("train.eval_share=null")  # as every evaluation was of all tokens
    folders = dict(word.split("=", 1) for word in words)
    succeed("run", *words)
    return Path(folders.get("output_dir", "outputs"), "losses", folders["run_name"])


@pytest.mark.parametrize("name", sorted(RECORDED.keys() - CHANGED))
def test_a_configuration_trains_to_the_same_losses(name: str, old: Path) -> None:
    """Every logged loss agrees with the recorded one to 1e-6, whatever CPU this is."""
    then = RECORDED[name]
    folder = train(name)
    rows, results = read_metrics(folder), read_results(folder)
    for key in ("train_loss", "val_loss"):
        assert column(rows, key) == pytest.approx(then[key], rel=1e-6), key
    for key in ("final_val_loss", "test_loss"):
        assert results[key] == pytest.approx(then[key], rel=1e-6), key
    assert results["data_fingerprint"] == then["data_fingerprint"]


def test_a_run_resumes_to_the_same_bits(old: Path) -> None:
    """A run that was killed behind its checkpoint at step 4 ends as if nothing had happened.

    Dropout and accumulation are what a careless resume would get wrong.  The killed run is the
    finished one without what it wrote after step 4, but for the rows of its metrics.csv.
    """
    more = ("hardware.micro_batch_size=2", "train.keep_every=1024", "run_name=bits")
    whole = train("dropout", *more)
    killed = Path("killed", "losses", "bits")
    shutil.copytree(whole, killed)
    checkpoints = killed / "checkpoints"
    for path in checkpoints.iterdir():
        if path.name != "step_4.ckpt":
            path.unlink()
    shutil.copyfile(checkpoints / "step_4.ckpt", checkpoints / "last.ckpt")
    shutil.copyfile(checkpoints / "step_4.ckpt", checkpoints / "best.ckpt")
    (killed / "results.json").unlink()
    lines = (killed / "metrics.csv").read_text().splitlines(keepends=True)
    kept = "".join(lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= 4])
    train("dropout", *more, "output_dir=killed")
    assert (killed / "metrics.csv").read_text().startswith(kept)  # it did not begin anew
    assert read_results(killed) == read_results(whole)
    assert read_metrics(killed) == read_metrics(whole)
    for file in ("final.ckpt", "best.ckpt", "last.ckpt"):
        assert read_weights(checkpoints / file) == read_weights(whole / "checkpoints" / file), file


def test_hardware_never_changes_the_experiment(old: Path) -> None:
    """Losses agree to 1e-5 whether a batch is cut into passes of 8, 4 or 1, on 1 or 2 threads.

    Each of the eight steps logs its own loss: another order of the tokens would show.
    """
    found = {}
    for size, threads in ((8, 1), (4, 2), (1, 1)):
        cut = [f"hardware.micro_batch_size={size}", f"hardware.threads={threads}"]
        folder = train("accumulated", *cut, f"run_name=cut-{size}-{threads}")
        rows, results = read_metrics(folder), read_results(folder)
        found[size, threads] = rows, results
        assert results["threads"] == threads
    first_rows, first = found[8, 1]
    for rows, results in found.values():
        for key in ("train_loss", "val_loss"):
            assert column(rows, key) == pytest.approx(column(first_rows, key), rel=1e-5)
        assert column(rows, "tokens") == column(first_rows, "tokens")
        for key in ("config_hash", "data_fingerprint", "train_tokens", "total_steps"):
            assert results[key] == first[key]
        assert results["final_val_loss"] == pytest.approx(first["final_val_loss"], rel=1e-5)
