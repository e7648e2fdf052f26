"""The folder of a run: which it is, begun or taken up again, and how a failure is told in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from tinygpt import fileio, pretrained, rundir
from tinygpt.config import Config, ConfigError, RunError, is_out_of_memory
from tinygpt.data import corpora, shards
from tinygpt.training.branching import Branch
from tinygpt.training.trainer import AtomicCheckpoints, Device

log = logging.getLogger("tinygpt")


def identify(
    config: Config, overrides: list[str], corpus: corpora.Corpus
) -> tuple[str, rundir.RunDir]:
    """The configuration's hash and folder; fills in ``study`` and ``run_name``."""
    content = pretrained.contents(corpus, config)
    config.study = config.study or "runs"
    run = rundir.RunDir(rundir.folder_of(config, overrides, rundir.config_hash(config, content)))
    config.run_name = run.path.name
    return run.hash_in(config, content), run


def begin(
    config: Config,
    run: rundir.RunDir,
    prepared: shards.Prepared,
    device: Device,
    hash_: str,
    rounds: dict[str, Any],
    branch: Branch | None,
) -> bool:
    """Makes the folder, or checks that what is there can be gone on with.  True: resuming."""
    run.error.unlink(missing_ok=True)
    fileio.remove_torn(run.path, run.checkpoints)
    if run.last.exists():
        mend(run)
        _check_begun(config, run, device, rounds)
        before = rundir.read_config(run.config)
        for name in rundir.FREE:
            if (old := getattr(before.train, name)) != (new := getattr(config.train, name)):
                log.info("note    train.%s=%s from here on, %s before", name, new, old)
        return True
    branching = branch is not None and branch.is_ready()
    # first, as it says whose folder this is
    fileio.write_json(
        run.environment,
        rundir.environment(
            config_hash=hash_,
            precision_resolved=device.precision,
            **rounds,
            strategy=device.strategy,
            device=device.name,
            init_from=config.init_from,
            branched_from=branch.trunk.path.name if branch and branch.trunk and branching else None,
            branched_at_step=branch.step if branch and branching else None,
        ),
    )
    run.checkpoints.mkdir(exist_ok=True)
    run.write_config(config)
    prepared.tokenizer.save(run.tokenizer)
    if branch is not None and branching:
        branch.begin(run)
    elif branch is not None and branch.trunk is not None:
        log.info(
            "note    %s has no step %d: trained from the start", branch.trunk.path, branch.step
        )
    return branching


def _check_begun(
    config: Config, run: rundir.RunDir, device: Device, rounds: dict[str, Any]
) -> None:
    """Raises ConfigError for what cannot go on here; notes what will round in another way."""
    before = {"devices": 1, **fileio.read_json(run.environment, precision_resolved=str)}
    stack = (fileio.read_yaml(run.config).get("sweep") or {}).get("stack", "off")
    strategies = before.get("strategy"), rundir.read_config(run.config).hardware.strategy
    for name, is_removed in {
        "sweep.stack": before.get("stacked") or stack != "off",
        "hardware.strategy=fsdp": "fsdp" in strategies,
    }.items():
        if is_removed:
            raise ConfigError(f"{name}: removed; {run.path} was begun with it, use force=true")
    if before.get("compile") == "whole":  # as an earlier version called it
        before["compile"] = "on"
    if before["precision_resolved"] != device.precision:
        raise ConfigError(
            f"train.precision={device.precision}: {run.path} was begun at "
            f"{before['precision_resolved']}; go on with that, or use force=true"
        )
    for name, value in rounds.items():
        if before.get(name, value) != value:
            line = "note: begun with %s %s, now %s: equal within rounding, not bit for bit"
            log.info(line, name, before[name], value)


def mend(run: rundir.RunDir) -> None:
    """Puts the newest whole checkpoint in the place of a damaged last one, and says so.

    Raises ConfigError where there is none.
    """
    io = AtomicCheckpoints()
    try:
        io.load_checkpoint(run.last)
    except ConfigError:
        steps = {}
        for path in set(run.checkpoints.glob("[!.]*.ckpt")) - {run.last}:
            with contextlib.suppress(ConfigError):
                steps[path] = int(io.load_checkpoint(path)["global_step"])
        if not steps:
            raise
        newest = max(steps, key=lambda path: (steps[path], path.name))
        log.info("note    %s is damaged: from %s, step %d", run.last, newest.name, steps[newest])
        fileio.copy(newest, run.last)


@contextlib.contextmanager
def failures_recorded(run: rundir.RunDir) -> Iterator[None]:
    """A run that fails says why in ``error.json``, in one line; it is tried again next time.

    Raises RunError for a lack of memory, anything else as it comes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        if run.environment.exists() and not isinstance(error, ConfigError):
            with contextlib.suppress(OSError):
                fileio.write_json(run.error, {"error": line})
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory: {line}; try a smaller hardware.micro_batch_size or model"
            ) from error
        raise
