"""Where Hydra meets tinygpt.sweeping: ``hydra/sweeper=tinygpt`` and ``hydra/launcher=tinygpt``.

Hydra finds its plugins in the package ``hydra_plugins`` only.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class StudySweeper(Sweeper):
    """Every combination of ``params`` and of the command line's values, handed over at once."""

    def __init__(self, params: DictConfig) -> None:
        self.params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from tinygpt.cli import one_line_errors
        from tinygpt.sweeping.jobs import expand

        @one_line_errors
        def run() -> Sequence[JobReturn]:
            params: Any = OmegaConf.to_container(self.params, resolve=True)
            assert self.launcher is not None
            returned = self.launcher.launch(expand(params, arguments, self.loader), 0)
            if any(job.status == JobStatus.FAILED for job in returned):
                raise SystemExit(1)
            return returned

        return run()


class StudyLauncher(Launcher):
    """Does the jobs that a sweeper asks for, by the engine that ``launcher=`` names.

    A training returns its final validation loss, which a sweeper that optimises makes small.
    """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.file = str(config.hydra.job.config_name)
        self.optimises = str(config.hydra.sweeper._target_).endswith(OptunaStudy.__name__)
        self.returned: list[tuple[list[str], Any]] = []  # the overrides and outcome of every job

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from tinygpt.cli import one_line_errors

        outcomes = one_line_errors(self._do)(job_overrides)
        done = [
            (list(overrides), outcome)
            for overrides, outcome in zip(job_overrides, outcomes, strict=True)
        ]
        self.returned += done
        return [self._told(overrides, outcome) for overrides, outcome in done]

    def _told(self, overrides: list[str], outcome: Any) -> JobReturn:
        """Return what Hydra's sweeper is told: Optuna's fails a trial for a word as its value."""
        status, value = JobStatus.COMPLETED, outcome.value
        if outcome.status == "planned" and self.optimises:
            value = "planned"
        elif outcome.failed:
            status = status if self.optimises else JobStatus.FAILED
            value = outcome.reason if self.optimises else RuntimeError(outcome.reason)
        return JobReturn(overrides=overrides, status=status, _return_value=value)

    def _do(self, jobs: Sequence[Sequence[str]]) -> list[Any]:
        """Return the outcomes; what an optimiser asks for may be impossible, and alone fails."""
        from tinygpt.config import ConfigError
        from tinygpt.sweeping.engines import Outcome
        from tinygpt.sweeping.study import KINDS, run_study

        try:
            return list(run_study(jobs, KINDS[self.file]))
        except ConfigError as error:
            if not self.optimises:
                raise
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self._do([job])]
            print(f"failed     {error}")
            return [Outcome("failed", reason=str(error))]


class OptunaStudy(Sweeper):
    """Hydra's sweeper for Optuna, with a study's folder for its results and the best trial told."""

    def __init__(self, **settings: Any) -> None:
        plugin: Any = importlib.import_module("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
        self.storage = settings["storage"]
        self.inner = plugin.OptunaSweeper(**{**settings, "max_failure_rate": 1.0})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.settings = config.copy()
        self.inner.setup(
            hydra_context=hydra_context, task_function=task_function, config=self.settings
        )

    def sweep(self, arguments: list[str]) -> None:
        from tinygpt.cli import one_line_errors

        one_line_errors(self._sweep)(arguments)

    def _sweep(self, arguments: list[str]) -> None:
        from tinygpt import words
        from tinygpt.config import RunError
        from tinygpt.fileio import read_yaml
        from tinygpt.sweeping.jobs import compose_jobs, study_name
        from tinygpt.sweeping.study import KINDS

        words.check_storage(self.storage)
        settings, sweeper = self.settings, self.inner.sweeper
        launcher = sweeper.launcher
        folder = Path(settings.output_dir, settings.study or study_name(settings, arguments))
        OmegaConf.set_readonly(settings, False)
        OmegaConf.update(settings, "hydra.sweep.dir", str(folder))
        if settings.plan:
            print(f"{sweeper.n_trials} trials, as this one")
            sweeper.n_trials = 1
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)
        try:
            sweeper.sweep(arguments)
        except ValueError as error:
            if "No trials" not in str(error):
                raise
        if settings.plan:
            return
        ended = [(job, outcome) for job, outcome in launcher.returned if not outcome.failed]
        ended = [(job, outcome) for job, outcome in ended if math.isfinite(outcome.value)]
        if not ended:
            reasons = {outcome.reason or outcome.status for _, outcome in launcher.returned}
            raise RunError(f"no trial came to a result: {'; '.join(sorted(reasons))}")
        best, outcome = min(ended, key=lambda pair: float(pair[1].value))
        path = compose_jobs([best], KINDS[launcher.file])[0].run.path
        params = read_yaml(folder / "optimization_results.yaml")["best_params"]
        swept = [word for word in best if word.split("=")[0] in params]
        print(f"best       {' '.join(swept)}  {outcome.shown}\nfolder     {path}")


# Hydra loads plugins in a way that dataclasses do not survive: plain dictionaries.
for group, node in (
    ("sweeper", {"_target_": "hydra_plugins.tinygpt_study.StudySweeper", "params": {}}),
    ("launcher", {"_target_": "hydra_plugins.tinygpt_study.StudyLauncher"}),
):
    ConfigStore.instance().store(group=f"hydra/{group}", name="tinygpt", node=node)
