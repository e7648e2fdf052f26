"""Analyse a study of adaptation: means by document, paired differences, laws in the steps.

Documents are the random sample: records are averaged within a document first, and every interval
is over documents.  Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from tinygpt.adaptation.records import NUMBERS, WHOLE, Record, read_records
from tinygpt.config import ConfigError
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.laws import Array
from tinygpt.scaling.wording import count

RAW = "lora_doc"  # the inner loop on the raw document, with which every method is compared
REFERENCES = ("none", RAW, "oracle", "full_ft_doc")  # methods without edits chosen by the model
REMOVED = ("uniform_directive", "fixed_best_directive")  # methods of earlier versions
ORDER = ("none", RAW, "lora_edit", "lora_doc+edit", "restem", "oracle", "full_ft_doc")
BASE = ["task", "base_parameters"]
PLACE = [*BASE, "method", "iteration", "lora_rank"]
OUTCOMES = ["reward", "forgetting", "accuracy_gain"]
MEANS = [
    *("accuracy_before", "accuracy_after"),
    *("tokens_processed", "policy_tokens", "tokens_total", "sft_tokens", "flops_est"),
]
AGREE = ("policy_backend", "policy_model", "tokens_processed")  # expected to be equal within a row
REPLICAS = 4000
FEW = 8  # documents; with fewer, bootstrap intervals cover less than 94 %
REASONS = 8  # shown at most
FEWEST_STEPS = 3  # different k needed to contradict a power law


@dataclass(frozen=True)
class Adaptation:
    """Hold the tables of a study, with a row per setting and losses in nats."""

    summary: pd.DataFrame
    paired: pd.DataFrame  # test documents, each method less ``lora_doc`` at equal tokens
    laws: pd.DataFrame  # reward = c·k^a, or the reason for its absence
    restem: pd.DataFrame  # by iteration, at the largest k
    notes: tuple[str, ...]  # what was excluded or averaged over
    seed: int

    @property
    def tested(self) -> pd.DataFrame:
        """Return the rows of the summary with results on test documents."""
        return self.summary[(self.summary["split"] == "test") & (self.summary["documents"] > 0)]


def load_records(*folders: str | Path) -> pd.DataFrame:
    """Return every record of the ``adapt.jsonl`` files under ``folders``, one per row.

    ``attrs`` counts what is excluded: ``torn`` last lines of killed studies, records ``repeated``
    in several runs, and records of ``removed`` methods.  Raises ConfigError for a line that is not
    a record, and for a ``run_id`` with two rewards.
    """
    found = (path for one in folders for path in sorted(Path(one).rglob("adapt.jsonl")))
    rows: list[Record] = []
    torn = 0
    for path in {path.resolve(): path for path in found}.values():
        records, is_torn = read_records(path)
        rows += [{**row, "folder": str(path.parent)} for row in records]
        torn += is_torn
    if not rows:
        raise ConfigError(f"runs={','.join(map(str, folders))}: no record of an adaptation yet")
    table = pd.DataFrame(rows)
    types: dict[str, Any] = dict.fromkeys(WHOLE, "Int64") | dict.fromkeys(NUMBERS, float)
    numbers = {name: pd.to_numeric(table[name]) for name in types}
    table = table.assign(**numbers).astype({**types, "accepted": "boolean"})
    measured = np.isfinite(table["reward"]) & np.isfinite(table["forgetting"])
    error = table["error"].astype(object).mask(table["error"].isna(), None)
    table["error"] = error.mask(~measured & error.isna(), "not finite")
    old = table["method"].isin(REMOVED)
    table = table[~old]
    once = table.drop_duplicates(["run_id", "reward"], ignore_index=True)
    twice = once[once["run_id"].duplicated(keep=False)].sort_values("run_id")
    if len(twice):
        one, other = twice.iloc[0], twice.iloc[1]
        raise ConfigError(
            f"run_id={one['run_id']}: reward {one['reward']:g} in {one['folder']} "
            f"and {other['reward']:g} in {other['folder']}"
        )
    once.attrs = {"torn": torn, "repeated": len(table) - len(once), "removed": int(old.sum())}
    return once


def by_order(methods: Iterable[str]) -> list[str]:
    """Sort methods: references first and last, iterations by number."""

    def place(name: str) -> tuple[int, int, str]:
        return ORDER.index(name if name in ORDER else "restem"), len(name), name

    return sorted(set(methods), key=place)


def bases(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and the rows of each task and size of the base."""
    for (task, parameters), part in table.groupby(BASE):
        yield f"{str(task).replace('_', ' ')}, {int(str(parameters)):,} parameters", part


def analyse_adaptation(records: pd.DataFrame, seed: int = 0) -> Adaptation:
    """Return the tables of a study, with bootstrap ``seed``, or raise ConfigError."""
    if records["error"].notna().all():
        raise ConfigError(f"none of these {len(records)} records has a reward")
    table = records.assign(
        accuracy_gain=records["accuracy_after"] - records["accuracy_before"],
        policy_tokens=records[["policy_tokens", "policy_prompt_tokens"]].fillna(0).sum(axis=1),
        tuned_lr=records["lr"].where(records["split"] == "tune"),  # elsewhere part of the edit
    )
    table["tokens_total"] = table["tokens_processed"] + table["policy_tokens"]
    notes = tuple(_notes(table, records.attrs))
    table = table[table["method"].notna()]  # skipped documents have none
    tables = summarise(table, seed), paired(table), laws(table, seed), restem(table, seed)
    return Adaptation(*tables, notes, seed)


def _notes(table: pd.DataFrame, counts: dict[Any, Any]) -> Iterator[str]:
    reasons = table["error"].value_counts()
    for reason, number in reasons.head(REASONS).items():
        methods = by_order(table[table["error"] == reason]["method"].dropna())
        where = f" ({', '.join(f'`{name}`' for name in methods)})" if methods else ""
        yield f"{count(number, 'record')} of {len(table):,} without a result: {reason}{where}"
    if len(reasons) > REASONS:
        yield f"{len(reasons) - REASONS} other reasons, each of fewer records"
    told = {
        "torn": ("torn last line", "left out: the study was killed there"),
        "removed": ("record", f"of the removed methods `{'` and `'.join(REMOVED)}` left out"),
        "repeated": ("record", "found in several runs and counted once"),
    }
    for name, (what, words) in told.items():
        if number := counts.get(name, 0):
            yield f"{count(number, what)} {words}"
    keys = [*PLACE, "split", "inner_steps"]
    places = table.groupby([*keys, "seed", "doc_sha256"], dropna=False)["folder"].nunique()
    if (places > 1).any():
        yield (
            "rows average over several adaptations of the same base size, document and seed; fit "
            "folders that differ in a setting separately"
        )
    for name in (name for name in AGREE if name in table):
        if (table.groupby(keys, dropna=False)[name].nunique() > 1).any():
            values = ", ".join(str(value) for value in table[name].dropna().unique()[:5])
            yield f"`{name}` differs within a row of the summary ({values}): averaged over"


def _by(
    table: pd.DataFrame, keys: list[str], describe: Callable[[pd.DataFrame], dict[str, Any]]
) -> pd.DataFrame:
    """Return a row for each group that ``describe`` describes, starting with the keys."""
    rows = [
        dict(zip(keys, key, strict=True)) | said
        for key, group in table.groupby(keys, dropna=False)
        if (said := describe(group))
    ]
    found = pd.DataFrame(rows)
    return found.astype({name: "Int64" for name in WHOLE if name in found})


def _tested(table: pd.DataFrame) -> pd.DataFrame:
    """Return the successful records of test documents after at least one step."""
    good = (table["split"] == "test") & table["error"].isna()
    return table[good & (table["inner_steps"] > 0)]


# --- means over documents


@lru_cache(maxsize=64)
def _draws(n: int, seed: int) -> Array:
    """Return the weight of each of ``n`` documents in each resample, (REPLICAS, n)."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=REPLICAS)
    return counts / n


def mean_interval(values: Array, seed: int = 0) -> Interval:
    """Return the interval of a mean over documents, (n,).

    It has expanded bootstrap percentiles (Hesterberg 2015, arXiv:1411.5279), which correct for
    small samples; below ``FEW`` documents it is Student's t.  Its ends are nan if nothing varies.
    """
    n = len(values)
    if n < FEW or np.ptp(values) == 0:
        return mean_t(values)[0]
    low, high = np.quantile(_draws(n, seed) @ values, _expanded(n))
    return Interval(float(values.mean()), float(low), float(high), LEVEL, "bootstrap (documents)")


def _expanded(n: int) -> tuple[float, float]:
    quantile = special.stdtrit(n - 1, 0.5 + LEVEL / 2)
    tail = float(special.ndtr(-np.sqrt(n / (n - 1)) * quantile))
    return tail, 1 - tail


def mean_t(values: Array) -> tuple[Interval, float]:
    """Return Student's t interval of a mean, (n,), and p against zero: 1 if nothing varies."""
    n, nothing = len(values), float("nan")
    mean = float(values.mean()) if n else nothing
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else nothing
    if not error > 0:
        return Interval(mean, nothing, nothing, LEVEL, "t (documents)"), 1.0
    reach = float(special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(mean / error)))
    return Interval(mean, mean - reach, mean + reach, LEVEL, "t (documents)"), p


def share_interval(values: Array) -> Interval:
    """Return Clopper and Pearson's (1934) interval of a mean of shares, (n,) between 0 and 1."""
    n, hits, tail = len(values), float(values.sum()), (1 - LEVEL) / 2
    low = special.betaincinv(hits, n - hits + 1, tail) if hits > 0 else 0.0
    high = special.betaincinv(hits + 1, n - hits, 1 - tail) if hits < n else 1.0
    ends = (hits / n, float(low), float(high)) if n else (float("nan"),) * 3
    return Interval(*ends, LEVEL, "Clopper-Pearson")


def _ends(interval: Interval, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}low": interval.low, f"{prefix}high": interval.high}


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return a row per setting, and per learning rate where it was tuned."""

    def describe(group: pd.DataFrame) -> dict[str, Any]:
        good = group[group["error"].isna()]
        documents = good.groupby("doc_sha256")[[*OUTCOMES, *MEANS]].mean()
        row: dict[str, Any] = {"documents": len(documents), "seeds": good["seed"].nunique()}
        row |= {"records": len(group), "errors": int(group["error"].notna().sum())}
        for name in OUTCOMES:
            found = mean_interval(documents[name].dropna().to_numpy(), seed)
            row |= {name: found.estimate, f"{name}_sd": documents[name].std()}
            row |= _ends(found, f"{name}_")
        share = share_interval(documents["accuracy_after"].dropna().to_numpy())
        row |= {name: documents[name].mean() for name in MEANS} | _ends(share, "accuracy_after_")
        before = documents["accuracy_before"].dropna().unique()
        if len(before) == 1:  # all start from the same share, so the gain's interval is exact
            row |= {"accuracy_gain_low": share.low - before[0]}
            row |= {"accuracy_gain_high": share.high - before[0]}
        return {**row, "accepted": group["accepted"].astype(float).mean()}

    keys = [*BASE, "split", *PLACE[len(BASE) :], "inner_steps", "tuned_lr"]
    return _by(table, keys, describe)


# --- against the raw document


def paired(table: pd.DataFrame) -> pd.DataFrame:
    """Compare each method with ``lora_doc`` on test documents, at equal rank, steps and tokens.

    Seeds that both have are averaged within a document.  ``low``, ``high`` and ``p`` are by
    Student's t over documents, ``wilcoxon_p`` by the signed-rank test.  ``holm_p`` corrects ``p``
    over all comparisons of a base (Holm 1979), separately for self-edits and references.  A method
    without a rank is compared at every rank.
    """
    place, keys = [*BASE, "lora_rank", "inner_steps", "tokens_processed"], [*PLACE, "inner_steps"]
    cells = [*place, "method", "iteration", "seed", "doc_sha256"]
    means = _tested(table).groupby(cells, dropna=False)[OUTCOMES].mean().reset_index()
    raw = means[means["method"] == RAW].drop(columns=["method", "iteration"])
    others = means[~means["method"].isin(["none", RAW])]
    alone = others["lora_rank"].isna()
    ranks = raw[[*BASE, "lora_rank"]].drop_duplicates()
    spread = others[alone].drop(columns="lora_rank").merge(ranks, on=BASE)
    others = pd.concat([others[~alone], spread]) if len(spread) else others[~alone]
    both = others.merge(raw, on=[*place, "doc_sha256", "seed"], suffixes=("", "_raw"))
    for name in OUTCOMES:
        both[f"{name}_more"] = both[name] - both[f"{name}_raw"]
    names = [f"{name}{end}" for name in OUTCOMES for end in ("", "_raw", "_more")]
    documents = both.groupby([*keys, "doc_sha256"], dropna=False)[names].mean().reset_index()
    found = _by(documents, keys, _compared)
    if found.empty:
        return found
    found["self_edit"] = ~found["method"].isin(REFERENCES)
    groups = found.groupby([*BASE, "self_edit"])["p"]
    found["holm_p"] = groups.transform(lambda p: holm(p.to_numpy(dtype=float)))
    found["verdict"] = np.where(found["difference"] > 0, "better", "worse")
    found.loc[found["holm_p"] >= 1 - LEVEL, "verdict"] = "no evidence"
    return found


def _compared(group: pd.DataFrame) -> dict[str, Any]:
    from scipy import stats  # slow to import

    values = group["reward_more"].to_numpy()
    found, p = mean_t(values)
    more, _ = mean_t(group["forgetting_more"].to_numpy())
    return {
        "documents": len(values),
        **{name: group[name].mean() for one in OUTCOMES for name in (one, f"{one}_raw")},
        "difference": found.estimate,
        **_ends(found),
        "p": p,
        "wilcoxon_p": float(stats.wilcoxon(values).pvalue) if np.any(values) else 1.0,
        "forgetting_difference": more.estimate,
        **_ends(more, "forgetting_"),
    }


def holm(p: Array) -> Array:
    """Return Holm's correction of p values, (n,), valid for any dependence between the tests."""
    order = np.argsort(p)
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(found, 1.0)


# --- laws in the steps


def laws(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Fit reward = c·k^a to each method's means over test documents, or say why not."""

    def describe(group: pd.DataFrame) -> dict[str, Any]:
        means = group.pivot_table(index="doc_sha256", columns="inner_steps", values="reward")
        return power_law(means.dropna(), seed)

    good = _tested(table)
    return _by(good[good["method"] != "none"], PLACE, describe)


def power_law(rewards: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """Fit the law of one method, with bootstrap intervals over documents.

    ``rewards`` has a row per document and a column per k.  The fit is least squares on the log of
    the means; ``left`` is their largest relative deviation from the law.
    """
    none = dict.fromkeys(("c", "c_low", "c_high", "a", "a_low", "a_high", "left"), float("nan"))
    row: dict[str, Any] = {"documents": len(rewards), **none, "reason": ""}
    steps, means = rewards.columns.to_numpy(dtype=float), rewards.mean().to_numpy()
    if reason := _why_none(steps, means, len(rewards)):
        return {**row, "reason": reason}
    x = np.log(steps)
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)

    def fit(means: Array) -> tuple[Any, Any]:  # (..., k) -> c, a
        a = np.log(means) @ weights
        return np.exp(np.log(means).mean(axis=-1) - a * x.mean()), a

    c, a = fit(means)
    law = c * steps**a
    left = float(np.expm1(np.abs(np.log(means / law)).max()))
    for k, at in zip(steps, law, strict=True):
        band = mean_interval(rewards[k].to_numpy(), seed)
        if at < band.low or at > band.high:  # False if the band is nan
            reason = f"the law leaves the interval of the mean at k = {k:g}; off by {left:.0%}"
            return {**row, "reason": f"{reason} at most"}
    row |= {"c": float(c), "a": float(a), "left": left}
    if len(rewards) < FEW:
        return {**row, "reason": f"{count(len(rewards), 'document')}: too few for an interval"}
    replicas = _draws(len(rewards), seed) @ rewards.to_numpy()
    if (replicas <= 0).any():
        return {**row, "reason": "a mean may be zero or less: no interval"}
    for name, values in zip(("c", "a"), fit(replicas), strict=True):
        row[f"{name}_low"], row[f"{name}_high"] = np.quantile(values, _expanded(len(rewards)))
    return row


def _why_none(steps: Array, means: Array, documents: int) -> str:
    if documents < 2:
        return f"{count(documents, 'document')} with all k"
    if len(steps) < FEWEST_STEPS:
        return f"{len(steps)} different k; a law needs {FEWEST_STEPS}"
    if (means <= 0).any():
        return f"the mean is not positive at k = {steps[means <= 0][0]:g}"
    falls = np.flatnonzero(np.diff(means) <= 0)
    if len(falls):
        return f"the mean does not rise from k = {steps[falls[0]]:g} to {steps[falls[0] + 1]:g}"
    return ""


# --- iterations, and the front


def restem(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return mean and best reward of a document's edits by iteration, weighted by proposals."""

    def describe(group: pd.DataFrame) -> dict[str, Any]:
        good = group[group["error"].isna()]
        if good.empty:
            return {}
        by_edit = good.groupby(["doc_sha256", "edit_id"])
        times = by_edit["times_proposed"].max().fillna(1)
        edits = pd.DataFrame({"times": times, "best": by_edit["reward"].mean()})
        edits["mean"] = edits["best"] * times
        by_document = edits.groupby("doc_sha256")
        documents = by_document.sum().assign(best=by_document["best"].max())
        documents["mean"] /= documents["times"]
        row = {"inner_steps": group["inner_steps"].iloc[0], "documents": len(documents)}
        row["edits"] = documents["times"].mean()
        for name in ("mean", "best"):
            found = mean_interval(documents[name].to_numpy(), seed)
            row |= {name: found.estimate, **_ends(found, f"{name}_")}
        learned = group.groupby("doc_sha256")["accepted"].max().astype(float)
        return {**row, "accepted": learned.mean()}  # of the documents

    rounds = table[table["method"].str.startswith("restem")]
    rounds = rounds[rounds["inner_steps"] == rounds.groupby(BASE)["inner_steps"].transform("max")]
    return _by(rounds, [*BASE, "lora_rank", "split", "iteration"], describe)


def pareto_front(forgetting: Array, reward: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which points, (n,), no other dominates with less forgetting and more reward."""
    as_good = (forgetting <= forgetting[:, None]) & (reward >= reward[:, None])
    better = (forgetting < forgetting[:, None]) | (reward > reward[:, None])
    return np.asarray(~(as_good & better).any(axis=1))
