"""A stand-in for ``tinygpt.adaptation.loop.adapt`` that keeps to its contract in no time: what the
sweep around it does can be seen without a model."""

from __future__ import annotations

import math
import os
from typing import Any

from rich.console import Console

from tinygpt import fileio
from tinygpt.adaptation.config import AdaptConfig, identify, methods_of
from tinygpt.adaptation.records import FIELDS, Record, append, read_records, repair
from tinygpt.config import RunError
from tinygpt.runs import rundir

# Run by every Python that finds it first: the workers of a sweep too.
SITE = """
import sys, types
module = types.ModuleType("tinygpt.adaptation.loop")
def adapt(config, overrides, console):
    from tests.adapting import adapt
    return adapt(config, overrides, console)
module.adapt = adapt
sys.modules[module.__name__] = module
"""


def reward_of(method: str, rank: int, steps: int, seed: int, document: int) -> float:
    """More with more steps; of some methods more than of others."""
    each = {"none": 0.0, "lora_doc": 0.02, "oracle": 0.04}.get(method, 0.03)
    return each * math.sqrt(steps) + 0.001 * (rank + seed + document) * (method != "none")


def records_of(config: AdaptConfig) -> list[Record]:
    rank, found = config.inner.lora.rank or 0, []
    for method in methods_of(config):
        for document in range(config.documents.test):
            for steps in config.inner.inner_steps if method != "none" else [0]:
                reward = reward_of(method, rank, steps, config.seed, document)
                what = [config.run, config.seed, method, rank, document, steps]
                found.append(
                    dict.fromkeys(FIELDS)
                    | {
                        "run_id": fileio.digest(what),
                        "seed": config.seed,
                        "task": config.documents.task,
                        "method": method,
                        "doc_sha256": str(document),
                        "split": "test",
                        "inner_steps": steps,
                        "lora_rank": rank if method != "none" else None,
                        "tokens_processed": steps * config.inner.tokens_per_step,
                        "policy_prompt_tokens": 0,
                        "policy_tokens": 0,
                        "sft_tokens": 0,
                        "flops_est": 1e6 * steps,
                        "base_parameters": 1000,
                        "reward": reward,
                        "forgetting": 0.01 * steps,
                    }
                )
    return found


def adapt(config: AdaptConfig, overrides: list[str], console: Console) -> dict[str, Any]:
    """``TINYGPT_TEST_STOP=seed=2`` fails there, half way."""
    hash_, run = identify(config, overrides)
    finished = run.finished(hash_)
    if finished is not None and not config.force:
        return finished
    with run.locked():
        run.error.unlink(missing_ok=True)
        run.log.touch()
        fileio.write_json(run.environment, {"config_hash": hash_})
        run.write_config(config)
        records = records_of(config)
        repair(run.records)
        done = {record["run_id"] for record in read_records(run.records)[0]}
        for number, record in enumerate(records):
            if record["run_id"] not in done:
                append(run.records, [record])
            stop = os.environ.get("TINYGPT_TEST_STOP") == f"seed={config.seed}"
            if stop and number == len(records) // 2:
                fileio.write_json(run.error, {"error": "RunError: stopped"})
                raise RunError("stopped")
        results = results_of(config, hash_, records)
        fileio.write_json(run.results, results)
    return results


def results_of(config: AdaptConfig, hash_: str, records: list[Record]) -> dict[str, Any]:
    most = config.inner.inner_steps[-1]
    rewards = {}
    for method in methods_of(config):
        last = [r for r in records if r["method"] == method and r["inner_steps"] in (0, most)]
        rewards[f"reward_{method}"] = sum(r["reward"] for r in last) / len(last)
    return {
        "schema_version": rundir.SCHEMA_VERSION,
        "study": config.study,
        "run_name": config.run_name,
        "config_hash": hash_,
        "git_commit": None,
        "seed": config.seed,
        "status": "finished",
        "task": config.documents.task,
        "base_run": config.run,
        "base_parameters": 1000,
        "lora_rank": config.inner.lora.rank,
        "policy": config.policy.kind,
        "records": len(records),
        "errors": 0,
        **rewards,
    }
