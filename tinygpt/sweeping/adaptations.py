"""Adaptations as jobs of a study."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinygpt import cli, rundir
from tinygpt.adaptation import config as adapting
from tinygpt.adaptation.config import AdaptConfig, count_records, count_trials, methods_of
from tinygpt.config import ConfigError
from tinygpt.counting import count_parameters
from tinygpt.sweeping.jobs import StudyJob

REWARD = "reward_"  # what precedes a method's name in results.json


@dataclass(eq=False)
class AdaptationJob(StudyJob):
    """How one run adapts, at one setting."""

    config: AdaptConfig

    command = cli.ADAPT
    outside = ("run", "checkpoint", "data", "policy")
    study = "adaptation"
    verb = "adapting"
    same = "do the same"
    measure = ("reward", "best reward")
    report = "report.html"

    @staticmethod
    def contents(config: AdaptConfig) -> dict[str, str]:
        return adapting.contents(config)

    @staticmethod
    def config_hash(config: AdaptConfig, content: dict[str, str]) -> str:
        return adapting.config_hash(config, content)

    def effective_hash(self) -> str:
        return self.hash

    @classmethod
    def prepare(
        cls, jobs: Sequence[AdaptationJob], done: Container[AdaptationJob], console: Console
    ) -> None:
        for accelerator in {job.config.hardware.accelerator for job in jobs} - {"auto", "cpu"}:
            from tinygpt.trained import usable_device  # torch, for what may not be there

            usable_device(accelerator, "hardware.accelerator")
        for job in jobs:
            job.row = planned(job.config)

    @classmethod
    def print_plan(
        cls, jobs: Sequence[AdaptationJob], done: Container[AdaptationJob], console: Console
    ) -> None:
        from tinygpt.training.console import short

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("run", overflow="fold")
        for name in ("base", "parameters", "methods", "documents", "edits", "records", "FLOPs", ""):
            table.add_column(name, justify="left" if name == "base" else "right", overflow="fold")
        todo = [job for job in jobs if job not in done]
        for job in jobs:
            documents, row = job.config.documents, job.row
            table.add_row(
                job.label,
                Path(job.config.run).name,
                short(row["base_parameters"]),
                str(len(methods_of(job.config))),
                f"{documents.train}+{documents.tune}+{documents.test}",
                f"{row['trials']:,}",
                f"{row['total_steps']:,}",
                f"{job.flops:.2e}",
                "" if job in todo else "finished",
            )
        console.print(table, highlight=False, markup=False)
        console.print("documents: train + tune + test", highlight=False)
        records = sum(job.row["total_steps"] for job in todo)
        line = f"{len(todo)} to do: {records:,} records, {sum(job.flops for job in todo):.2e} FLOPs"
        console.print(f"\n{line}", highlight=False, soft_wrap=True)

    @classmethod
    def stages(cls, jobs: Sequence[AdaptationJob]) -> Sequence[Sequence[AdaptationJob]]:
        return [jobs]

    def do(self, console: Console) -> dict[str, Any]:
        from tinygpt.adaptation.loop import adapt

        return adapt(self.config, list(self.overrides), console)

    def came_to(self, results: Mapping[str, Any]) -> tuple[float | None, str]:
        """The best mean reward on test documents, and of which method."""
        found = {k: v for k, v in results.items() if k.startswith(REWARD) and v is not None}
        best = max(found, key=found.__getitem__, default=None)
        return (found[best], best.removeprefix(REWARD)) if best else (None, "")

    def progress(self) -> tuple[float, str]:
        try:
            lines = self.run.records.read_bytes().split(b"\n")[:-1]
        except OSError:
            return 0.0, "starting"
        total = self.row["total_steps"]
        if not lines:
            return 0.0, "starting"
        last = json.loads(lines[-1])
        gained = "" if last["reward"] is None else f" {last['reward']:+.2f}"
        words = f"{len(lines)}/{total} records  {last['method'] or 'passed over'}{gained}"
        return min(1.0, len(lines) / total), words

    @staticmethod
    def rows(folder: Path) -> list[dict[str, Any]]:
        from tinygpt.scaling.runs import read_rows

        rows = read_rows(folder, find=rundir.find_adaptations)
        return [{**row, "methods": " ".join(row.get("methods") or ())} for row in rows]

    @staticmethod
    def fit(folder: Path, console: Console) -> None:
        """The answer, or one line why there is none."""
        from tinygpt.adaptation import report

        try:
            report.make([folder], folder / "fit")
        except ConfigError as error:
            console.print(f"report     none: {error}", highlight=False, soft_wrap=True)

    @staticmethod
    def show_fit(folder: Path, console: Console) -> None:
        report = folder / "fit" / AdaptationJob.report
        console.print(f"report     {report}", highlight=False, soft_wrap=True)


def planned(config: AdaptConfig) -> dict[str, Any]:
    """What can be counted before.  FLOPs: of the steps on adapters 2N forward and 2N backward a
    token, and 2N for each token that is scored after them."""
    from tinygpt.data.tokenizers import load_tokenizer

    base = rundir.open_run(config.run)
    vocab_size = load_tokenizer(base.tokenizer).vocab_size
    n = count_parameters(rundir.read_config(base.config).model, vocab_size).total
    trials, records, documents = count_trials(config), count_records(config), config.documents
    heldout = documents.heldout_tokens if documents.task == "domain_shift" else 0
    trained = trials * config.inner.inner_steps[-1] * config.inner.tokens_per_step
    scored = records * (heldout + documents.forgetting_tokens)
    return {
        "base_parameters": n,
        "trials": trials,
        "total_steps": records,
        "flops_exact": float(4 * n * trained + 2 * n * scored),
    }
