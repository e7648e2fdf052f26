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

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from tinygpt.cli import one_line_errors
        from tinygpt.sweeping.study import KINDS, run_study

        return [
            JobReturn(
                overrides=list(overrides),
                status=JobStatus.FAILED if outcome.failed else JobStatus.COMPLETED,
                _return_value=RuntimeError(outcome.reason) if outcome.failed else outcome.value,
            )
            for overrides, outcome in zip(
                job_overrides,
                one_line_errors(run_study)(job_overrides, KINDS[self.file]),
                strict=True,
            )
        ]


# Hydra loads plugins in a way that dataclasses do not survive: plain dictionaries.
for group, node in (
    ("sweeper", {"_target_": "hydra_plugins.tinygpt_study.StudySweeper", "params": {}}),
    ("launcher", {"_target_": "hydra_plugins.tinygpt_study.StudyLauncher"}),
):
    ConfigStore.instance().store(group=f"hydra/{group}", name="tinygpt", node=node)
