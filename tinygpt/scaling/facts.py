"""Turn an analysis into the plain values of ``fit.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tinygpt import fileio
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.fitting import Fit
from tinygpt.scaling.frontier import Frontier
from tinygpt.scaling.intervals import Interval
from tinygpt.scaling.laws import LAWS
from tinygpt.scaling.selection import Candidate

SCHEMA_VERSION = 1


def facts(analysis: Analysis) -> dict[str, Any]:
    """Return all numbers of a report, with None for unknown and non-finite values."""
    fit, total, runs, noise = analysis.fit, analysis.in_total, analysis.runs, analysis.noise
    held, ahead = analysis.held_out, analysis.forecast
    solver = ("starts", "basins", "gradient_norm", "smallest_eigenvalue", "converged", "at_bound")
    tested = ["error", "worst", "within", "half_width", "runs", "groups", "cut", "distance"]
    tested += ["best_cheaper", "plane", "has_skill", "largest"]
    values = {
        "schema_version": SCHEMA_VERSION,
        **_pick(analysis, "question", "is_evidence", "verdict"),
        "law": fit.law.name,
        **_pick(fit.law, "formula", "source"),
        "variables": {
            name: {"column": column, "meaning": analysis.words[name]}
            for name, column in analysis.variables.items()
        },
        "loss": fit.loss,
        "parameters": _parameters(fit, analysis.intervals),
        "in_total": total
        and {"column": analysis.columns.n_total}
        | {"parameters": _parameters(total, analysis.total_intervals)},
        "r_squared": fit.r_squared,
        "runs": len(runs),
        "other_settings": {
            setting: {value: len(names) for value, names in by_value.items()}
            for setting, by_value in analysis.others.items()
        },
        "left_out": len(analysis.left_out),
        "notes": analysis.notes,
        "shared_trunks": shared_trunks(runs),
        "data_hash": data_hash(analysis),
        "seed": analysis.seed,
        "method": {
            **_pick(fit, "estimator", "reason"),
            "residuals": fit.unit,
            **_pick(fit.optimum, "threshold", "objective"),
            "scale": fit.scale,
            "weights": fit.points.weights,
            "degrees_of_freedom": fit.degrees,
            **_pick(fit.optimum, *solver),
            "bounds_met": fit.bounds_met,
        },
        "floor": analysis.floor,
        "noise": noise and {k: value for k, value in vars(noise).items() if k != "weights"},
        "structure_p": analysis.structure,
        "selection": [_candidate(one, analysis) for one in analysis.candidates],
        "held_out": held
        and {**_pick(held, *tested), "weights": held.below.by_law, "rate": held.below.rate},
        "forecast": ahead and {"weights": ahead.by_law, "rate": ahead.rate},
        "checks": [{"name": c.title, "passed": c.passed, **vars(c)} for c in analysis.checks],
        "single_runs": [
            {"run": analysis.columns.name_of(runs, one.row)}
            | {name: value for name, value in vars(one).items() if name != "row"}
            for one in analysis.single
        ],
        "predictions": [
            {
                **_pick(one, "place", "flops", "asked"),
                "loss": one.loss.estimate,
                "interval": one.loss,
                "loss_of_a_run": one.run.estimate,
                "interval_of_a_run": one.run,
            }
            for one in analysis.predictions
        ],
        "unanswered": analysis.unanswered,
        "budgets": [
            {
                "flops": one.flops,
                **{
                    name: {"estimate": band.estimate, "interval": band}
                    for name, band in _pick(one, "n", "d", "loss", "run").items()
                },
                **_pick(one, "twice_too_large", "twice_too_small"),
            }
            for one in analysis.budgets
        ],
        "frontier": analysis.frontier and _frontier(analysis.frontier),
        "next_run": analysis.next_run,
    }
    return dict(_plain(values))


def _pick(one: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(one, name) for name in names}


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON holds it, with None for what JSON cannot express."""
    if isinstance(value, Interval):  # a lower end of 0 is not set by the data
        value = {"low": value.low or None, **_pick(value, "high", "level", "method")}
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if value is pd.NA or value is pd.NaT else value


def _parameters(fit: Fit, intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        name: {"estimate": value, "interval": intervals.get(name)}
        for name, value in fit.parameters.items()
    }


def _candidate(one: Candidate, analysis: Analysis) -> dict[str, Any]:
    best, held = analysis.candidates[0], analysis.held_out
    fit = one.fit
    return {
        "law": one.law,
        "formula": LAWS[one.law].formula,
        "aicc": one.aicc,
        "delta_aicc": one.aicc - best.aicc,
        "parameters": len(fit.optimum.law) if fit else None,
        "r_squared": fit.r_squared if fit else None,
        "at_bound": fit.optimum.at_bound if fit else (),
        "held_out_error": held.by_law.get(one.law) if held else None,
        "not_fitted": one.reason or None,
    }


def _frontier(path: Frontier) -> dict[str, Any]:
    law = path.law
    return {
        "largest_budget": path.budget,
        "ways": path.table().to_dict("records"),
        **_pick(path, "missing", "disagreements"),
        "profiles": [
            _pick(one, "budget", "best", "method")
            | {"n_by_parabola": one.parabola, "reason": one.reason}
            for one in path.isoflop.profiles
        ],
        "law": {
            "flops": law.flops if law else [],
            **{name: getattr(law, name).estimate if law else [] for name in ("n", "d", "loss")},
        },
        "replicas_without_best_split": law and law.undefined,
    }


def data_hash(analysis: Analysis) -> str:
    """Return the hash of the fitted values, which does not depend on where the runs are."""
    names = [column for name, column in vars(analysis.columns).items() if name != "run"]
    columns = [column for column in dict.fromkeys(names) if column in analysis.runs]
    return fileio.digest(_plain(analysis.runs[columns].to_dict("records")))


def shared_trunks(runs: pd.DataFrame) -> dict[str, float] | None:
    """Return the FLOPs spent by runs that share trunks, the FLOPs of independent runs, and the
    share saved; None if no run branched off another one here."""
    names = {"run_name", "branched_from", "branched_at_step", "total_steps", "flops_exact"}
    if not names <= set(runs):
        return None
    branched = runs["branched_from"].isin(runs["run_name"])  # only with its trunk it saves FLOPs
    if not branched.any():
        return None
    flops, shared = runs["flops_exact"], runs["branched_at_step"] / runs["total_steps"]
    total = float(flops.sum())
    saved = float((flops * shared.where(branched, 0.0)).astype(float).sum())
    return {"flops": total - saved, "independent_flops": total, "saved": saved / total}
