"""Let Optuna choose the runs of a sweep, for ``hydra/sweeper=optuna``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tinygpt import cli, words
from tinygpt.config import ConfigError, RunError
from tinygpt.fileio import write_text
from tinygpt.sweeping.jobs import Kind, compose_jobs, study_name
from tinygpt.sweeping.kinds import KINDS
from tinygpt.sweeping.study import run_study
from tinygpt.sweeping.workers import Outcome

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


def search(
    config: DictConfig,
    settings: Mapping[str, Any],
    arguments: Sequence[str],
    loader: ConfigLoader | None = None,
) -> None:
    """Make ``settings["n_trials"]`` runs that Optuna chooses, and print the best.

    ``settings`` are the keys of ``hydra.sweeper``; with a ``storage``, earlier trials count.  The
    intervals, ranges and choices in ``arguments``, the command line, are the search space.  Raises
    ConfigError for a setting that Optuna does not accept, RunError if no trial has a finite loss.
    """
    from optuna.trial import TrialState

    kind = KINDS[str(config.hydra.job.config_name)]
    given = [*arguments, *(f"{key}={value}" for key, value in settings["params"].items())]
    given = list({item.split("=")[0]: item for item in reversed(given)}.values())[::-1]
    with cli.in_one_line(given, kind.command):
        items = OverridesParser.create(loader).parse_overrides(words.as_meant(given, kind.command))
    swept = [item for item in items if item.is_sweep_override()]
    space = {item.get_key_element(): _distribution(item, kind) for item in swept}
    fixed = [str(item.input_line) for item in items if item not in swept]
    name = str(config.study or study_name(config, list(arguments)))
    study = _open_study(settings, name)
    to_do = settings["n_trials"] - sum(trial.state.is_finished() for trial in study.trials)
    if settings["storage"]:
        print(f"{settings['storage']}: {to_do} of {settings['n_trials']} trials to make")
    if config.plan:
        print(f"{to_do} trials, all like this one")
        to_do = min(to_do, 1)
    reasons = set()
    while to_do > 0:
        trials = [study.ask(space) for _ in range(min(to_do, settings["n_jobs"]))]
        to_do -= len(trials)
        jobs = [[*fixed, *map(_written, trial.params.items())] for trial in trials]
        for trial, job, outcome in zip(trials, jobs, _outcomes(jobs, kind), strict=True):
            trial.set_user_attr("overrides", job)
            if outcome.failed or config.plan:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, outcome.value)
            reasons.add(outcome.reason or outcome.status)
    if not config.plan:
        _report(study, Path(config.output_dir, name), kind, reasons)


def _written(param: tuple[str, Any]) -> str:
    """Return the override of a parameter; floats have four digits, as they name folders."""
    key, value = param
    return f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"


def _open_study(settings: Mapping[str, Any], name: str) -> optuna.Study:
    """Return Optuna's study, from the storage if one is given.  Raises ConfigError."""
    import optuna

    for key in ("n_trials", "n_jobs"):
        if not isinstance(value := settings[key], int) or value < 1:
            raise ConfigError(f"hydra.sweeper.{key}={value}: must be an integer of at least 1")
    if str(settings["direction"]).lower() != "minimize":
        direction = settings["direction"]
        raise ConfigError(
            f"hydra.sweeper.direction={direction}: must be minimize, as runs are compared by loss"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage, sampler = settings["storage"], dict(settings["sampler"])
    name = settings["study_name"] or name
    try:
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    except Exception as error:  # the driver of the storage can raise anything
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"hydra.sweeper.storage={storage}: {line}") from None
    if sampler["seed"] is not None:  # the same seed would choose the same runs again
        sampler["seed"] += len(study.trials)
    try:
        study.sampler = instantiate(sampler)
    except InstantiationException as error:
        line = str(error).strip().splitlines()[1]
        raise ConfigError(f"hydra.sweeper.sampler: {line}") from None
    return study


def _distribution(item: Override, kind: Kind) -> BaseDistribution:
    """Return the distribution of an interval, a range or a choice."""
    from optuna import distributions

    value: Any = item.value()
    if isinstance(value, IntervalSweep):
        whole = words.value_types(kind.command).get(item.get_key_element()) == {int}
        number: Any = distributions.IntDistribution if whole else distributions.FloatDistribution
        try:
            return cast("BaseDistribution", number(value.start, value.end, "log" in value.tags))
        except ValueError as error:
            raise ConfigError(f"{item.input_line}: {error}") from None
    values = list(item.sweep_string_iterator())
    if isinstance(value, RangeSweep) and not value.shuffle:
        low, high = float(values[0]), float(values[-1])
        if all(isinstance(each, int) for each in (value.start, value.step)):
            return distributions.IntDistribution(int(low), int(high), step=int(value.step))
        return distributions.FloatDistribution(low, high, step=float(value.step))
    return distributions.CategoricalDistribution(values)


def _outcomes(jobs: Sequence[Sequence[str]], kind: Kind) -> list[Outcome]:
    """Return how each job ended; an invalid job fails alone."""
    try:
        return list(run_study(jobs, kind))
    except ConfigError as error:
        if len(jobs) > 1:
            return [outcome for job in jobs for outcome in _outcomes([job], kind)]
        print(f"failed     {error}")
        return [Outcome("failed", reason=str(error))]


def _report(study: optuna.Study, folder: Path, kind: Kind, reasons: set[str]) -> None:
    """Print the best trial and its folder, and write ``optimization_results.yaml``."""
    ended = [t for t in study.trials if t.value is not None and math.isfinite(t.value)]
    if not ended:
        raise RunError(f"no trial ended with a result: {'; '.join(sorted(reasons))}")
    best = min(ended, key=lambda trial: trial.value or 0.0)
    path = compose_jobs([best.user_attrs["overrides"]], kind)[0].run.path
    folder.mkdir(parents=True, exist_ok=True)
    swept = [_written(param) for param in best.params.items()]
    chosen = dict(item.split("=", 1) for item in swept)
    results = {"name": "optuna", "best_params": chosen, "best_value": best.value}
    write_text(folder / "optimization_results.yaml", OmegaConf.to_yaml(results))
    print(f"best       {' '.join(swept)}  {best.value:.4f}\nfolder     {path}")
