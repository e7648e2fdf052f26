"""A stand-in for ``tinygpt.adaptation.loop.adapt`` that keeps to its contract in no time: what the
sweep around it does can be seen without a model."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from rich.console import Console

from tinygpt import fileio
from tinygpt.adaptation.config import AdaptConfig, identify, methods_of
from tinygpt.adaptation.records import FIELDS, Record, append, read_records, repair
from tinygpt.config import RunError

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
USUAL = """{"seed": 0, "method": "lora_doc", "task": "new_facts", "split": "test", "doc_id": "a",
"doc_sha256": "a", "edit_id": "e", "edit": {}, "inner_steps": 10, "lora_rank": 8, "lr": 0.001,
"base_parameters": 182272, "batch_tokens": 256, "policy_backend": "self", "policy_model": "m",
"policy_prompt_tokens": 0, "policy_tokens": 0, "sft_tokens": 0, "flops_est": 1e9, "reward": 0.5,
"forgetting": 0.25, "accuracy_before": 0.0, "accuracy_after": 0.5}"""


def record(**values: Any) -> Record:
    """One line of ``adapt.jsonl`` with all its fields."""
    found: Record = dict.fromkeys(FIELDS) | json.loads(USUAL) | values
    found["tokens_processed"] = found["inner_steps"] * found["batch_tokens"]
    found["run_id"] = found["run_id"] or fileio.digest(found)[:16]
    return found


def records_of(config: AdaptConfig) -> list[Record]:
    """More reward with more steps; of some methods more than of others."""
    rank, found = config.inner.lora.rank or 0, []
    for method in methods_of(config):
        each = {"none": 0.0, "lora_doc": 0.02, "oracle": 0.04}.get(method, 0.03)
        for document in range(config.documents.test):
            for steps in config.inner.inner_steps if method != "none" else [0]:
                more = 0.001 * (rank + config.seed + document) * (method != "none")
                found.append(
                    record(
                        run_id=fileio.digest(
                            [config.run, config.seed, method, rank, document, steps]
                        ),
                        seed=config.seed,
                        method=method,
                        doc_sha256=str(document),
                        inner_steps=steps,
                        lora_rank=rank if method != "none" else None,
                        reward=each * math.sqrt(steps) + more,
                    )
                )
    return found


def adapt(config: AdaptConfig, overrides: list[str], console: Console) -> dict[str, Any]:
    """``TINYGPT_TEST_STOP=seed=2`` fails there, half way."""
    hash_, run = identify(config, overrides)
    if (finished := run.finished(hash_, config.force)) is not None:
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
    most, rewards = config.inner.inner_steps[-1], {}
    for method in methods_of(config):
        last = [r for r in records if r["method"] == method and r["inner_steps"] in (0, most)]
        rewards[f"reward_{method}"] = sum(r["reward"] for r in last) / len(last)
    return {
        "run_name": config.run_name,
        "config_hash": hash_,
        "seed": config.seed,
        "status": "finished",
        "lora_rank": config.inner.lora.rank,
        "records": len(records),
        **rewards,
    }
