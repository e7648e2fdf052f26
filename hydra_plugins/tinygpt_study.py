"""Where Hydra meets tinygpt.sweeping: ``hydra/sweeper=tinygpt`` and ``hydra/launcher=tinygpt``.

Hydra finds its plugins in the package ``hydra_plugins`` only.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.loader, self.file = hydra_context.config_loader, str(config.hydra.job.config_name)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from tinygpt.cli import one_line_errors
        from tinygpt.sweeping.jobs import expand
        from tinygpt.sweeping.kinds import KINDS

        @one_line_errors
        def run() -> Sequence[JobReturn]:
            params: Any = OmegaConf.to_container(self.params, resolve=True)
            assert self.launcher is not None
            command = KINDS[self.file].command
            returned = self.launcher.launch(expand(params, arguments, self.loader, command), 0)
            if any(job.status == JobStatus.FAILED for job in returned):
                raise SystemExit(1)
            return returned

        return run()


class StudyLauncher(Launcher):
    """Does the jobs that a sweeper asks for, by the engine that ``launcher=`` names."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.file = str(config.hydra.job.config_name)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from tinygpt.cli import one_line_errors
        from tinygpt.sweeping.kinds import KINDS
        from tinygpt.sweeping.study import run_study

        outcomes = one_line_errors(run_study)(job_overrides, KINDS[self.file])
        return [
            JobReturn(
                overrides=overrides,
                status=JobStatus.FAILED if outcome.failed else JobStatus.COMPLETED,
                _return_value=RuntimeError(outcome.reason) if outcome.failed else outcome.value,
            )
            for overrides, outcome in zip(job_overrides, outcomes, strict=True)
        ]


class OptunaSweeper(Sweeper):
    """Asks Optuna which runs to make, and minimizes their final validation loss."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.composed = hydra_context.config_loader, config

    def sweep(self, arguments: list[str]) -> None:
        from tinygpt.cli import one_line_errors
        from tinygpt.sweeping.search import search

        one_line_errors(search)(self.composed, self.settings, arguments, self.loader)


# Hydra loads plugins in a way that dataclasses do not survive: plain dictionaries.
OPTUNA = {"n_trials": 20, "n_jobs": 1, "direction": "minimize", "params": {}}
OPTUNA |= {"storage": None, "study_name": None, "defaults": [{"sampler": "tpe"}, "_self_"]}
OPTUNA |= {"_recursive_": False}
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}
nodes: list[tuple[str, str, dict[str, Any]]] = [
    ("sweeper", "tinygpt", {"_target_": f"{__name__}.StudySweeper", "params": {}}),
    ("launcher", "tinygpt", {"_target_": f"{__name__}.StudyLauncher"}),
    ("sweeper", "optuna", {"_target_": f"{__name__}.OptunaSweeper", **OPTUNA}),
]
for name, sampler in SAMPLERS.items():
    nodes += [("sweeper/sampler", name, {"_target_": f"optuna.samplers.{sampler}", "seed": 0})]
for group, name, node in nodes:
    ConfigStore.instance().store(group=f"hydra/{group}", name=name, node=node)
