"""The jobs of a study: expanded, composed, named and checked, all before any of them runs."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser

from tinygpt import cli, rundir, words
from tinygpt.checks import check_sweepable
from tinygpt.config import HORIZONS, Config, ConfigError, Settings
from tinygpt.explaining import Command
from tinygpt.horizon import Plan

if TYPE_CHECKING:
    from rich.console import Console

J = TypeVar("J", bound="StudyJob")


@dataclass(eq=False)
class StudyJob(ABC):
    """One run of a study, of whatever kind: what the sweep needs to know of it."""

    overrides: tuple[str, ...]
    config: Settings
    label: str  # what tells it from the others: d_model=64 seed=1
    content: dict[str, str]  # fingerprints of what is read from outside
    hash: str
    run: rundir.RunDir
    # what results.json will say of its size; total_steps and flops_exact at least
    row: dict[str, Any] = field(default_factory=dict)

    command: ClassVar[Command[Any]]
    outside: ClassVar[tuple[str, ...]]  # keys of what is read from outside
    study: ClassVar[str]  # where a run goes that names none
    verb: ClassVar[str]
    same: ClassVar[str]  # what two jobs may not both do
    measure: ClassVar[tuple[str, str]]  # what a run comes to, in a line and above a column
    report: ClassVar[str]  # the last file in the folder of its fit

    @property
    def steps(self) -> float:
        """That this job itself has to do."""
        return float(self.row["total_steps"])

    @property
    def flops(self) -> float:
        """Of these steps."""
        return float(self.row["flops_exact"])

    @staticmethod
    @abstractmethod
    def contents(config: Any) -> dict[str, str]:
        """Fingerprints of what the keys ``outside`` name.  Raises ConfigError."""

    @staticmethod
    @abstractmethod
    def config_hash(config: Any, content: dict[str, str]) -> str: ...

    @abstractmethod
    def effective_hash(self) -> str:
        """The same for two jobs that do the same, however they are spelt."""

    @classmethod
    @abstractmethod
    def prepare(cls, jobs: Sequence[Any], done: Container[Any], console: Console) -> None:
        """Checks machine and data of every job, and fills in its ``row``.

        Some of them are ``done``: what is shown of a plan, or taken over from.  Raises ConfigError.
        """

    @classmethod
    @abstractmethod
    def print_plan(cls, jobs: Sequence[Any], done: Container[Any], console: Console) -> None:
        """What would be done, at what cost; of prepared jobs, of which some are ``done``."""

    @classmethod
    @abstractmethod
    def stages(cls, jobs: Sequence[Any]) -> Sequence[Sequence[StudyJob]]:
        """Return the jobs in stages that follow one another; those of a stage in any order."""

    @abstractmethod
    def do(self, console: Console) -> dict[str, Any]:
        """Do the job and return its results."""

    @abstractmethod
    def came_to(self, results: Mapping[str, Any]) -> tuple[float | None, str]:
        """The one number that is shown of a run's results, and of what it is, if that varies."""

    @abstractmethod
    def progress(self) -> tuple[float, str]:
        """The part done, and what there is to say of it, from the files in its folder."""

    @staticmethod
    @abstractmethod
    def rows(folder: Path) -> list[dict[str, Any]]:
        """A row for every run of this kind in a study's folder."""

    @staticmethod
    @abstractmethod
    def fit(folder: Path, console: Console) -> None:
        """What the runs of a study say together, or one line why nothing."""

    @staticmethod
    @abstractmethod
    def show_fit(folder: Path, console: Console) -> None:
        """The closing lines of a fit that was made before, from its files."""


@dataclass(eq=False)
class Job(StudyJob):
    """A training."""

    config: Config
    plan: Plan | None = None  # once its data is prepared
    val_tokens: int = 0
    keep_at: list[int] = field(default_factory=list)  # steps at which others branch off
    trunk: rundir.RunDir | None = None  # the run whose first steps are this one's too
    branch_step: int = 0

    command = cli.RUN
    outside = ("data", "tokenizer", "init_from")
    study = "runs"
    verb = "training"
    same = "train the same model"
    measure = ("val", "val loss")
    report = "fit.json"

    @property
    def steps(self) -> float:
        """Not those that it takes over from a trunk."""
        return float(self.row["total_steps"] - self.branch_step)

    @property
    def flops(self) -> float:
        own: float = 1 - self.branch_step / self.row["total_steps"]
        return own * float(self.row["flops_exact"])

    @staticmethod
    def contents(config: Config) -> dict[str, str]:
        from tinygpt import pretrained
        from tinygpt.data import corpora  # heavier; mistakes in the keys are known by now

        return pretrained.contents(corpora.open_corpus(config.data), config)

    @staticmethod
    def config_hash(config: Config, content: dict[str, str]) -> str:
        return rundir.config_hash(config, content)

    def effective_hash(self) -> str:
        return rundir.effective_hash(self.config, self.content)

    @classmethod
    def prepare(cls, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        from tinygpt.sweeping import trainings

        trainings.prepare(jobs, console)
        if jobs[0].config.sweep.share_trunk:
            trainings.share_trunks(jobs, done)

    @classmethod
    def print_plan(cls, jobs: Sequence[Job], done: Container[Job], console: Console) -> None:
        from tinygpt.sweeping.planning import print_plan

        print_plan(jobs, done, console)

    @classmethod
    def stages(cls, jobs: Sequence[Job]) -> Sequence[Sequence[Job]]:
        """Trunks first, then their branches."""
        stages = [job for job in jobs if not job.trunk], [job for job in jobs if job.trunk]
        return [stage for stage in stages if stage]

    def do(self, console: Console) -> dict[str, Any]:
        from tinygpt.sweeping import trainings

        return trainings.train(self, console)

    def came_to(self, results: Mapping[str, Any]) -> tuple[float | None, str]:
        return results["final_val_loss"], ""

    def progress(self) -> tuple[float, str]:
        from tinygpt.sweeping import trainings

        return trainings.progress(self)

    @staticmethod
    def rows(folder: Path) -> list[dict[str, Any]]:
        from tinygpt.scaling.runs import read_rows

        return read_rows(folder)

    @staticmethod
    def fit(folder: Path, console: Console) -> None:
        from tinygpt.sweeping import trainings

        trainings.fit(folder, console)

    @staticmethod
    def show_fit(folder: Path, console: Console) -> None:
        from tinygpt.sweeping import trainings

        trainings.show_fit(folder, console)


def flops_of(jobs: Iterable[StudyJob]) -> str:
    """What ``jobs`` compute, and what they save where they share trunks."""
    jobs = list(jobs)
    own, alone = (sum(job.flops for job in jobs), sum(job.row["flops_exact"] for job in jobs))
    saved = ""
    if own < alone:
        saved = f", saved {alone - own:.2e} ({1 - own / alone:.0%}) against independent runs"
        saved += " by sharing trunks"
    return f"{own:.2e} FLOPs{saved}"


def expand(
    params: Mapping[str, Any],
    arguments: Sequence[str],
    loader: ConfigLoader | None = None,
    command: Command[Any] = cli.RUN,
) -> list[list[str]]:
    """The overrides of every job: all combinations of the values of ``params`` and ``arguments``.

    A key of the command line takes the place of the experiment's.  ``params["together"]`` is a
    list of tables, each a sweep of its own on top of the rest.  Raises ConfigError where one key
    of such tables is given without the others.
    """
    given = _values_given(arguments, loader, command)
    horizons = {f"train.{name}" for name in HORIZONS}
    _check_together(params.get("together", []), set(given), horizons)
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


def _check_together(
    tables: Sequence[Mapping[str, Any]], given: set[str], horizons: set[str]
) -> None:
    """Raises ConfigError for a key that goes with others that are not ``given``.

    Each of its values would meet each of theirs: a width the heads of every other width.  A length
    is one of every run.
    """
    keys = {key for table in tables for key in table} - horizons
    varying = {key for key in keys if len({str(table.get(key)) for table in tables}) > 1}
    for key in sorted(varying & given):
        rest = {other for table in tables if key in table for other in table} & varying
        if rest - given:
            names = " and ".join(sorted(rest - given))
            raise ConfigError(
                f"{key}: the experiment changes it together with {names}; give all of them "
                "(every combination is trained), or none"
            )


def _values_given(
    arguments: Sequence[str], loader: ConfigLoader | None, command: Command[Any]
) -> dict[str, list[str]]:
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
    """A YAML value as an override spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value >= 1e6 and float(f"{value:g}") == value:
        return re.sub(r"e\+0*", "e", f"{value:g}")  # 3e12: it goes into names and labels
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else str(value)


@overload
def compose_jobs(job_overrides: Sequence[Sequence[str]]) -> list[Job]: ...


@overload
def compose_jobs(job_overrides: Sequence[Sequence[str]], kind: type[J]) -> list[J]: ...


def compose_jobs(
    job_overrides: Sequence[Sequence[str]], kind: type[StudyJob] = Job
) -> Sequence[StudyJob]:
    """Every job with its configuration, hash and folder.  Raises ConfigError."""
    configs = [cli.compose_for(kind.command, overrides) for overrides in job_overrides]
    for config in configs:
        if not config.plan:
            check_sweepable(config)
    varied = _varied_keys(job_overrides)
    contents: dict[str, dict[str, str]] = {}
    jobs = []
    for config, overrides in zip(configs, job_overrides, strict=True):
        source = " ".join(str(getattr(config, key)) for key in kind.outside)
        if source not in contents:
            contents[source] = kind.contents(config)
        hash_ = kind.config_hash(config, contents[source])
        swept = [o for o in overrides if _key(o) in varied]
        config.study = config.study or study_name(config, overrides, kind.study)
        folder = rundir.folder_of(config, swept or overrides, hash_)
        config.run_name = folder.name
        label = " ".join(
            f"{_key(o).rsplit('.', 1)[-1]}={rundir.unquoted(o.split('=', 1)[1])}" for o in swept
        )
        run = rundir.RunDir(folder)
        if isinstance(config, Config):
            hash_ = run.hash_in(config, contents[source])
        jobs.append(
            kind(tuple(overrides), config, label or folder.name, contents[source], hash_, run)
        )
    refuse_clashes(jobs)
    return jobs


def study_name(config: Settings, overrides: Sequence[str], otherwise: str = "runs") -> str:
    """An experiment's name, with its scale where it has scales."""
    experiments = [o.split("=", 1)[1] for o in overrides if _key(o) == "experiment"]
    if not experiments or experiments[-1] == "null":
        return otherwise
    return f"{experiments[-1]}-{config.scale}" if _preset_keys(config) else experiments[-1]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")


def _varied_keys(job_overrides: Sequence[Sequence[str]]) -> set[str]:
    """Keys that not every job gives the same value."""
    counts = Counter(override for overrides in job_overrides for override in set(overrides))
    return {_key(override) for override, count in counts.items() if count < len(job_overrides)}


def _preset_keys(config: Settings) -> set[str]:
    """What the experiment sets at this scale."""
    preset: dict[str, Any] = getattr(config.sweep, config.scale)
    tables: Iterable[dict[str, Any]] = [preset, *preset.get("together", [])]
    return {key for table in tables for key in table}


def refuse_clashes(jobs: Sequence[StudyJob]) -> None:
    """No two jobs may do the same or share a folder.  Raises ConfigError."""
    folders: dict[Path, StudyJob] = {}
    known: dict[str, StudyJob] = {}
    for job in jobs:
        same = known.setdefault(job.effective_hash(), job)
        if same is not job:
            raise ConfigError(f"{_difference(same, job)}: both {job.same}")
        sharing = folders.setdefault(job.run.path, job)
        if sharing is not job:
            raise ConfigError(f"{_difference(sharing, job)}: both would write {job.run.path}")


def _difference(one: StudyJob, other: StudyJob) -> str:
    ours = [o for o in one.overrides if o not in other.overrides]
    theirs = [o for o in other.overrides if o not in one.overrides]
    return f"{' '.join(ours) or 'a job'} and {' '.join(theirs) or 'another'}"
