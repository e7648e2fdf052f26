"""What ``fit.json`` says: the analysis as plain values, to be read by programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tinygpt import fileio
from tinygpt.scaling.analysis import Analysis, Prediction
from tinygpt.scaling.evidence import Check
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.frontier import Budget, Frontier
from tinygpt.scaling.intervals import Interval
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.selection import Candidate, HeldOut
from tinygpt.scaling.single import SingleRun

SCHEMA_VERSION = 1


def facts(analysis: Analysis) -> dict[str, Any]:
    """All numbers of a report.  What is not known, or not finite, is None."""
    fit = analysis.fit
    found = {
        "schema_version": SCHEMA_VERSION,
        "question": analysis.question,
        "is_evidence": analysis.is_evidence,
        "law": fit.law.name,
        "formula": fit.law.formula,
        "source": fit.law.source,
        "variables": {
            name: {"column": column, "meaning": analysis.words[name]}
            for name, column in analysis.variables.items()
        },
        "loss": fit.loss,
        "parameters": _parameters(fit, analysis.intervals),
        "in_total": _in_total(analysis),
        "r_squared": fit.r_squared,
        "runs": len(analysis.runs),
        "other_settings": {
            setting: {value: len(names) for value, names in values.items()}
            for setting, values in analysis.others.items()
        },
        "left_out": len(analysis.left_out),
        "notes": analysis.notes,
        "shared_trunks": vars(shared) if (shared := shared_trunks(analysis.runs)) else None,
        "data_hash": data_hash(analysis),
        "seed": analysis.seed,
        "method": _method(fit),
        "floor": analysis.floor,
        "noise": _noise(analysis),
        "structure_p": analysis.structure,
        "selection": _selection(analysis.candidates),
        "checks": [_check(check) for check in analysis.checks],
        "single_runs": [_single_run(analysis, one) for one in analysis.single],
        "predictions": [_prediction(one) for one in analysis.predictions],
        "unanswered": analysis.unanswered,
        "budgets": [_budget(one) for one in analysis.budgets],
        "frontier": _frontier(analysis.frontier),
        "next_run": vars(analysis.next_run) if analysis.next_run else None,
    }
    plain: dict[str, Any] = _plain(found)
    return plain


@dataclass(frozen=True)
class SharedTrunks:
    """What runs cost that took over the first steps of another, and what they would have alone."""

    flops: float
    independent_flops: float
    saved: float  # fraction


def shared_trunks(runs: pd.DataFrame) -> SharedTrunks | None:
    """None where no run among these branched off another of them."""
    names = ["run_name", "branched_from", "branched_at_step", "total_steps", "flops_exact"]
    if not set(names) <= set(runs):
        return None
    branched = runs["branched_from"].isin(runs["run_name"])  # without its trunk it saves nothing
    if not branched.any():
        return None
    flops, taken_over = runs["flops_exact"], runs["branched_at_step"] / runs["total_steps"]
    alone = float(flops.sum())
    saved = float((flops * taken_over.where(branched, 0.0)).astype(float).sum())
    return SharedTrunks(alone - saved, alone, saved / alone)


def data_hash(analysis: Analysis) -> str:
    """Of the values that the law was fitted to, wherever the runs lie."""
    names = {name: col for name, col in vars(analysis.columns).items() if name != "run"}
    wanted = [col for col in dict.fromkeys(names.values()) if col in analysis.runs]
    return fileio.digest(_plain(analysis.runs[wanted].to_dict("records")))


def _single_run(analysis: Analysis, one: SingleRun) -> dict[str, Any]:
    """Parts of the loss, standard errors of them, and what they say."""
    values = {name: value for name, value in vars(one).items() if name != "row"}
    return {"run": analysis.columns.name_of(analysis.runs, one.row), **values}


def _plain(value: Any) -> Any:
    """With None for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if value is pd.NA or value is pd.NaT else value


def _parameters(fit: Fit, intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        name: {"estimate": value, "interval": _interval(intervals.get(name))}
        for name, value in fit.parameters.items()
    }


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    """An end that the data do not set is None."""
    if interval is None:
        return None
    return {
        "low": interval.low or None,
        "high": interval.high,
        "level": interval.level,
        "method": interval.method,
    }


def _in_total(analysis: Analysis) -> dict[str, Any] | None:
    total = analysis.in_total
    if total is None:
        return None
    column = analysis.columns.n_total
    return {"column": column, "parameters": _parameters(total, analysis.total_intervals)}


def _method(fit: Fit) -> dict[str, Any]:
    found = fit.optimum
    return {
        "estimator": fit.estimator,
        "reason": fit.reason,
        "residuals": fit.unit,
        "threshold": found.threshold,  # None: of least squares there is none
        "objective": found.objective,
        "scale": fit.scale,
        "degrees_of_freedom": fit.degrees,
        "starts": found.starts,
        "basins": found.basins,
        "gradient_norm": found.gradient_norm,
        "smallest_eigenvalue": found.smallest_eigenvalue,
        "converged": bool(found.converged),
        "at_bound": found.at_bound,
        "bounds_met": fit.bounds_met,
    }


def _noise(analysis: Analysis) -> dict[str, Any] | None:
    return vars(analysis.noise) if analysis.noise else None


def _selection(candidates: list[Candidate]) -> list[dict[str, Any]]:
    return [
        {
            "law": one.law,
            "formula": LAWS[one.law].formula,
            "aicc": one.aicc,
            "delta_aicc": one.aicc - candidates[0].aicc,
            "parameters": len(one.fit.optimum.law) if one.fit else None,
            "r_squared": one.fit.r_squared if one.fit else None,
            "at_bound": one.fit.optimum.at_bound if one.fit else (),
            "held_out": _held_out(one.held_out),
            "not_fitted": one.reason or None,
        }
        for one in candidates
    ]


def _held_out(held: HeldOut | None) -> dict[str, Any] | None:
    if held is None:
        return None
    names = ("error", "worst", "within", "half_width", "runs", "cut", "distance")
    return {name: getattr(held, name) for name in names}


def _check(check: Check) -> dict[str, Any]:
    passed = None if check.passed is None else bool(check.passed)
    return {"name": check.name, "passed": passed, "detail": check.detail}


def _prediction(one: Prediction) -> dict[str, Any]:
    return {
        "place": one.place,
        "flops": one.flops,
        "asked": one.asked,
        "loss": one.loss.estimate,
        "interval": _interval(one.loss),
        "interval_of_a_run": _interval(one.run),
    }


def _frontier(path: Frontier | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return {
        "largest_budget": path.budget,
        "ways": path.table().to_dict("records"),
        "missing": path.missing,
        "disagreements": path.disagreements,
        "profiles": [
            {
                "budget": one.budget,
                "best": one.best,
                "method": one.method,
                "n_by_parabola": one.parabola,
                "reason": one.reason,
            }
            for one in path.isoflop.profiles
        ],
        "law": {name: getattr(path, name) for name in ("flops", "n", "d", "loss")},
        "replicas_without_best_split": path.law.undefined if path.law else None,
    }


def _budget(one: Budget) -> dict[str, Any]:
    intervals = {name: getattr(one, name) for name in ("n", "d", "loss", "run")}
    return {
        "flops": one.flops,
        **{k: {"estimate": v.estimate, "interval": _interval(v)} for k, v in intervals.items()},
        "twice_too_large": vars(one.twice_too_large),
        "twice_too_small": vars(one.twice_too_small),
    }
