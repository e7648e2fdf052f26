"""Expand, compose, name and check all jobs of a study before any of them runs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from tinygpt import cli, words
from tinygpt.config import HORIZONS, Config, ConfigError
from tinygpt.config.checks import check_sweepable
from tinygpt.config.horizon import Plan
from tinygpt.runs import rundir
from tinygpt.words import Command


class Kind(Protocol):
    """Define what a study does with its runs, which are trainings or adaptations."""

    command: Command[Any]
    study: str  # the name of a study by default
    outside: tuple[str, ...]  # keys that name files or models
    verb: str
    same: str  # what two jobs of a study must not both do
    metric: tuple[str, str]  # the headline metric's name in a line and as a column
    report: str  # the last file that a fit writes

    def find(self, folder: Path) -> list[Path]:
        """Return the folders of this kind of run in ``folder``."""

    def contents(self, config: Any) -> dict[str, str]:
        """Return fingerprints of what the keys ``outside`` name.  Raises ConfigError if missing."""

    def config_hash(self, config: Any, content: dict[str, str]) -> str: ...

    def effective_hash(self, config: Any, content: dict[str, str]) -> str:
        """Return a hash that two jobs share if they do the same."""

    def prepare(self, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        """Check machine and data, and set ``row`` and ``plan`` of every job.

        Raises ConfigError.
        """

    def print_plan(self, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        """Print what the prepared jobs that are not ``done`` would do and cost."""

    def run(self, job: Job, console: Console) -> dict[str, Any]:
        """Run the job and return its results."""

    def headline(self, results: Mapping[str, Any]) -> tuple[float | None, str]:
        """Return the headline metric of a run, and the method that has it, if several compete."""

    def progress(self, job: Job) -> tuple[float, str]:
        """Return the fraction done and the latest numbers, from the files in the run folder."""

    def fit(self, folder: Path, console: Console, anew: bool = True) -> None:
        """Fit the runs of a study, or show the fit made before."""


@dataclass(eq=False)
class Job:
    """Describe one run of a study."""

    kind: Kind
    overrides: tuple[str, ...]
    config: Any  # of the kind's command
    label: str  # the overrides that vary: d_model=64 seed=1
    content: dict[str, str]  # fingerprints of the files and models it reads
    hash: str
    run: rundir.RunDir
    # set by Kind.prepare: the results known beforehand, at least total_steps and flops_exact
    row: dict[str, Any] = field(default_factory=dict)
    plan: Plan = field(init=False)  # of a training
    val_tokens: int = 0
    # of a training that shares steps with others
    keep_at: list[int] = field(default_factory=list)  # steps at which others branch off
    trunk: rundir.RunDir | None = None  # the run that it branches off
    branch_step: int = 0

    @property
    def steps(self) -> float:
        """Return the number of steps after the trunk's."""
        return float(self.row["total_steps"] - self.branch_step)

    @property
    def flops(self) -> float:
        """Return the FLOPs of ``steps``."""
        own: float = 1 - self.branch_step / self.row["total_steps"]
        return own * float(self.row["flops_exact"])


def flops_of(jobs: Iterable[Job]) -> str:
    """Return the FLOPs of ``jobs`` in words, with what shared trunks save."""
    jobs = list(jobs)
    own, alone = (sum(job.flops for job in jobs), sum(job.row["flops_exact"] for job in jobs))
    saved = f", {1 - own / alone:.0%} saved by sharing trunks" if own < alone else ""
    return f"{own:.2e} FLOPs{saved}"


def expand(
    params: Mapping[str, Any],
    arguments: Sequence[str],
    loader: ConfigLoader | None = None,
    command: Command[Any] = cli.RUN,
) -> list[list[str]]:
    """Return the overrides of every job: all combinations of ``params`` and ``arguments``.

    A key of the command line replaces the experiment's.  ``params["together"]`` is a list of
    tables, each of which is swept with the other keys.  Raises ConfigError if the command line
    gives one key of these tables without the others.
    """
    given = _given_values(arguments, loader, command)
    tables = params.get("together", [{}])
    horizons = {f"train.{name}" for name in HORIZONS}
    _check_together(tables, set(given), horizons)
    replaced = horizons - set(given) if horizons & set(given) else set()
    rest = {key: value for key, value in params.items() if key != "together"}
    jobs: dict[tuple[str, ...], None] = {}
    for table in tables:
        preset = {key: value for key, value in {**rest, **table}.items() if key not in replaced}
        grid = {key: _written_all(value) for key, value in preset.items()} | given
        for values in itertools.product(*grid.values()):
            jobs[tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))] = None
    return [list(job) for job in jobs]


def _check_together(
    tables: Sequence[Mapping[str, Any]], given: set[str], horizons: set[str]
) -> None:
    """Raise ConfigError if a key is given without those that the experiment changes with it.

    Otherwise, each width would be combined with the heads of every other width.
    """
    keys = {key for table in tables for key in table} - horizons
    varying = {key for key in keys if len({str(table.get(key)) for table in tables}) > 1}
    for key in sorted(varying & given):
        others = {other for table in tables if key in table for other in table}
        if missing := others & varying - given:
            raise ConfigError(
                f"{key}: the experiment changes it together with {' and '.join(sorted(missing))}; "
                "give all of them (every combination is trained), or none"
            )


def _given_values(
    arguments: Sequence[str], loader: ConfigLoader | None, command: Command[Any]
) -> dict[str, list[str]]:
    """Return the values of each key on the command line."""
    given = {}
    arguments = words.as_meant(arguments, command)
    with cli.in_one_line(arguments, command):
        items = OverridesParser.create(loader).parse_overrides(list(arguments))
    for item in items:
        if not item.is_sweep_override():
            given[item.get_key_element()] = [item.get_value_element_as_str()]
        elif item.is_discrete_sweep():
            given[item.get_key_element()] = list(item.sweep_string_iterator())
        else:
            raise ConfigError(f"{item.input_line}: needs hydra/sweeper=optuna")
    return given


def _written_all(values: Any) -> list[str]:
    return [_written(value) for value in (values if isinstance(values, list) else [values])]


def _written(value: Any) -> str:
    """Return a YAML value as an override spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value >= 1e6 and float(f"{value:g}") == value:
        return re.sub(r"e\+0*", "e", f"{value:g}")  # 3e12, as it goes into names and labels
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def compose_jobs(job_overrides: Sequence[Sequence[str]], kind: Kind) -> list[Job]:
    """Return every job with its configuration, hash and folder.

    Raises ConfigError for a mistake in any job, and if two do the same or share a folder.
    """
    configs = [cli.compose_for(kind.command, overrides) for overrides in job_overrides]
    for config in configs:
        if not config.plan:
            check_sweepable(config)
    counts = Counter(override for overrides in job_overrides for override in set(overrides))
    varied = {_key(override) for override, n in counts.items() if n < len(job_overrides)}
    contents: dict[str, dict[str, str]] = {}
    known: dict[str, Job] = {}
    jobs = []
    for config, overrides in zip(configs, job_overrides, strict=True):
        source = " ".join(str(getattr(config, key)) for key in kind.outside)
        if source not in contents:
            contents[source] = kind.contents(config)
        content = contents[source]
        hash_ = kind.config_hash(config, content)
        swept = [override for override in overrides if _key(override) in varied]
        config.study = config.study or study_name(config, overrides, kind.study)
        run = rundir.RunDir(rundir.folder_of(config, swept or overrides, hash_))
        config.run_name = run.path.name
        if isinstance(config, Config):
            hash_ = run.hash_in(config, content)
        values = [(_key(o).rsplit(".", 1)[-1], rundir.unquoted(o.split("=", 1)[1])) for o in swept]
        label = " ".join(f"{name}={value}" for name, value in values) or run.path.name
        job = Job(kind, tuple(overrides), config, label, content, hash_, run)
        jobs.append(job)
        effect = kind.effective_hash(config, content)
        for clash, what in ((effect, kind.same), (str(run.path), f"would write {run.path}")):
            other = known.setdefault(clash, job)
            if other is not job:
                raise ConfigError(f"{_difference(other, job)}: both {what}")
    return jobs


def study_name(config: Any, overrides: Sequence[str], otherwise: str = "runs") -> str:
    """Return the experiment's name, with the scale if the experiment has scales."""
    experiments = [o.split("=", 1)[1] for o in overrides if _key(o) == "experiment"]
    if not experiments or experiments[-1] == "null":
        return otherwise
    has_scales = bool(getattr(config.sweep, config.scale))
    return f"{experiments[-1]}-{config.scale}" if has_scales else experiments[-1]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")


def _difference(one: Job, other: Job) -> str:
    ours = [o for o in one.overrides if o not in other.overrides]
    theirs = [o for o in other.overrides if o not in one.overrides]
    return f"{' '.join(ours) or 'a job'} and {' '.join(theirs) or 'another'}"
