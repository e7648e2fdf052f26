"""The jobs of a study: expanded, composed, named and checked, all before any of them runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser

from tinygpt import cli, rundir
from tinygpt.checks import check_sweepable
from tinygpt.config import HORIZONS, Config, ConfigError
from tinygpt.horizon import Plan


@dataclass(eq=False)
class Job:
    """One run of a study."""

    overrides: tuple[str, ...]
    config: Config
    label: str  # what tells it from the others: d_model=64 seed=1
    content: dict[str, str]  # fingerprints of what is read from outside
    hash: str
    run: rundir.RunDir
    row: dict[str, Any] = field(default_factory=dict)  # what results.json will say of its size
    plan: Plan | None = None  # once its data is prepared
    val_tokens: int = 0
    keep_at: list[int] = field(default_factory=list)  # steps at which others branch off
    trunk: rundir.RunDir | None = None  # the run whose first steps are this one's too
    branch_step: int = 0

    @property
    def flops(self) -> float:
        """What this job itself has to compute: not the steps that it takes over from a trunk."""
        own: float = 1 - self.branch_step / self.row["total_steps"]
        return own * float(self.row["flops_exact"])


Group = tuple[Job, ...]  # runs that train as one, or a run alone


def flops_of(jobs: Iterable[Job]) -> str:
    """What ``jobs`` compute, and what they save where they share trunks."""
    jobs = list(jobs)
    own, alone = (sum(job.flops for job in jobs), sum(job.row["flops_exact"] for job in jobs))
    saved = ""
    if own < alone:
        saved = f", saved {alone - own:.2e} ({1 - own / alone:.0%}) against independent runs"
        saved += " by sharing trunks"
    return f"{own:.2e} FLOPs{saved}"


def expand(
    params: Mapping[str, Any], arguments: Sequence[str], loader: ConfigLoader | None = None
) -> list[list[str]]:
    """The overrides of every job: all combinations of the values of ``params`` and ``arguments``.

    A key of the command line takes the place of the experiment's.  ``params["together"]`` is a
    list of tables, each a sweep of its own on top of the rest.
    """
    given = _values_given(arguments, loader)
    horizons = {f"train.{name}" for name in HORIZONS}
    replaced = set(given) | (horizons if horizons & set(given) else set())
    rest = {key: value for key, value in params.items() if key != "together"}
    jobs: dict[tuple[str, ...], None] = {}
    for table in params.get("together", [{}]):
        merged = {**rest, **table}
        kept = {key: value for key, value in merged.items() if key not in replaced - set(given)}
        grid = {key: given.get(key) or _written_all(value) for key, value in kept.items()} | given
        for values in itertools.product(*grid.values()):
            jobs[tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))] = None
    return [list(job) for job in jobs]


def _values_given(arguments: Sequence[str], loader: ConfigLoader | None) -> dict[str, list[str]]:
    given = {}
    with cli.explaining(arguments):
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
    """A YAML value as an override spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def compose_jobs(job_overrides: Sequence[Sequence[str]]) -> list[Job]:
    """Every job with its configuration, hash and folder.  Raises ConfigError."""
    configs = [cli.compose_config(overrides) for overrides in job_overrides]
    for config in configs:
        if not config.plan:
            check_sweepable(config)
    from tinygpt import pretrained
    from tinygpt.data import corpora  # heavier; mistakes in the keys are known by now

    varied = _varied_keys(job_overrides)
    contents: dict[str, dict[str, str]] = {}
    jobs = []
    for config, overrides in zip(configs, job_overrides, strict=True):
        source = f"{config.data} {config.tokenizer} {config.init_from}"
        if source not in contents:
            corpus = corpora.open_corpus(config.data)
            contents[source] = pretrained.contents(corpus, config)
        hash_ = rundir.config_hash(config, contents[source])
        swept = [o for o in overrides if _key(o) in varied]
        config.study = config.study or study_name(config, overrides)
        folder = rundir.folder_of(config, swept or overrides, hash_)
        config.run_name = folder.name
        words = [o.lstrip("+") for o in swept]
        label = " ".join(
            word.split("=")[0].rsplit(".", 1)[-1] + word[word.index("=") :] for word in words
        )
        run = rundir.RunDir(folder)
        jobs.append(
            Job(tuple(overrides), config, label or folder.name, contents[source], hash_, run)
        )
    refuse_clashes(jobs)
    return jobs


def study_name(config: Config, overrides: Sequence[str]) -> str:
    """An experiment's name, with its scale where it has scales; else ``runs``."""
    experiments = [o.split("=", 1)[1] for o in overrides if _key(o) == "experiment"]
    if not experiments or experiments[-1] == "null":
        return "runs"
    return f"{experiments[-1]}-{config.scale}" if _preset_keys(config) else experiments[-1]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")


def _varied_keys(job_overrides: Sequence[Sequence[str]]) -> set[str]:
    """Keys that not every job gives the same value."""
    counts = Counter(override for overrides in job_overrides for override in set(overrides))
    return {_key(override) for override, count in counts.items() if count < len(job_overrides)}


def _preset_keys(config: Config) -> set[str]:
    """What the experiment sets at this scale."""
    preset: dict[str, Any] = getattr(config.sweep, config.scale)
    tables: Iterable[dict[str, Any]] = [preset, *preset.get("together", [])]
    return {key for table in tables for key in table}


def refuse_clashes(jobs: Sequence[Job]) -> None:
    """No two jobs may train the same model or share a folder.  Raises ConfigError."""
    folders: dict[Path, Job] = {}
    models: dict[str, Job] = {}
    for job in jobs:
        same = models.setdefault(rundir.effective_hash(job.config, job.content), job)
        if same is not job:
            raise ConfigError(f"{_difference(same, job)}: both train the same model")
        sharing = folders.setdefault(job.run.path, job)
        if sharing is not job:
            raise ConfigError(f"{_difference(sharing, job)}: both would write {job.run.path}")


def _difference(one: Job, other: Job) -> str:
    ours = [o for o in one.overrides if o not in other.overrides]
    theirs = [o for o in other.overrides if o not in one.overrides]
    return f"{' '.join(ours) or 'a job'} and {' '.join(theirs) or 'another'}"
