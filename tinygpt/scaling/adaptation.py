"""What a study of adaptation came to: means by document, paired differences, laws in the steps.

Documents are what is drawn at random: records of a document are averaged first, and every
interval is over documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from tinygpt.config import ConfigError
from tinygpt.scaling.adaptation_records import BASE, RAW, REFERENCES, REMOVED, WHOLE, by_order
from tinygpt.scaling.fitting import fit
from tinygpt.scaling.intervals import LEVEL, Interval
from tinygpt.scaling.laws import Array
from tinygpt.scaling.wording import count

METHOD = ["method", "iteration", "lora_rank"]
OUTCOMES = ["reward", "forgetting", "accuracy_gain"]
ACCURACY = ["accuracy_before", "accuracy_after"]
SPENT = ["tokens_processed", "policy_tokens", "tokens_total", "sft_tokens", "flops_est"]
AGREE = ("policy_backend", "policy_model", "tokens_processed")  # within a row of the summary
REPLICAS = 4000
FEW = 8  # documents; resamples of fewer cover less than 94 %
REASONS = 8  # shown at most
FEWEST_STEPS = 3  # different k that can contradict a power law


@dataclass(frozen=True)
class Adaptation:
    """``summary``, ``paired``, ``laws`` and ``restem`` have a row a setting; losses in nats."""

    records: pd.DataFrame
    summary: pd.DataFrame
    paired: pd.DataFrame  # test documents, each method less ``lora_doc`` at equal tokens
    laws: pd.DataFrame  # reward = c·k^a, or the reason why there is none
    restem: pd.DataFrame  # by iteration, at the largest k
    notes: tuple[str, ...]  # what was left out or averaged over
    seed: int


# --- everything at once


def analyse_adaptation(records: pd.DataFrame, seed: int = 0) -> Adaptation:
    """All that is known of the study; ``seed`` is the bootstrap's.  Raises ConfigError."""
    if records["error"].notna().all():
        raise ConfigError(f"none of these {len(records)} records has a reward")
    table = records.assign(
        accuracy_gain=records["accuracy_after"] - records["accuracy_before"],
        policy_tokens=records["policy_tokens"].fillna(0)
        + records["policy_prompt_tokens"].fillna(0),
        # rates are compared on tune documents alone; elsewhere they are a part of the edit
        tuned_lr=records["lr"].where(records["split"] == "tune"),
    )
    table["tokens_total"] = table["tokens_processed"] + table["policy_tokens"]
    notes = tuple(_notes(table, records.attrs))
    table = table[table["method"].notna()]  # a document that was passed over has none
    return Adaptation(
        records,
        summarise(table, seed),
        paired(table),
        laws(table, seed),
        restem(table, seed),
        notes,
        seed,
    )


def _notes(table: pd.DataFrame, counts: dict[Any, Any]) -> Iterator[str]:
    lengths = r": (at most )?\d+ of \d+ tokens$"
    table = table.assign(error=table["error"].str.replace(lengths, "", regex=True))
    reasons = table["error"].value_counts()
    for reason, number in reasons.head(REASONS).items():
        methods = table[table["error"] == reason]["method"].dropna()
        where = ", ".join(f"`{name}`" for name in by_order(methods))
        line = f"{count(number, 'record')} of {len(table):,} without a result: {reason}"
        yield f"{line} ({where})" if where else line
    if len(reasons) > REASONS:
        yield f"{len(reasons) - REASONS} other reasons, each of fewer records"
    if counts.get("torn"):
        yield f"{count(counts['torn'], 'torn last line')} left out: the study was killed there"
    if counts.get("removed"):
        names = " and ".join(f"`{name}`" for name in REMOVED)
        yield f"{count(counts['removed'], 'record')} of the removed methods {names} left out"
    if counts.get("repeated"):
        yield f"{count(counts['repeated'], 'record')} found in several runs and counted once"
    keys = [*BASE, "split", *METHOD, "inner_steps"]
    places = table.groupby([*keys, "seed", "doc_sha256"], dropna=False)["folder"].nunique()
    if (places > 1).any():
        yield (
            "several adaptations of one base size, document and seed stand in one row: averaged "
            "over; fit folders apart that differ in a setting"
        )
    for name in AGREE:
        if name not in table:
            continue
        several = table.groupby(keys, dropna=False)[name].nunique()
        if (several > 1).any():
            values = ", ".join(str(value) for value in table[name].dropna().unique()[:5])
            yield f"`{name}` differs within a row of the summary ({values}): averaged over"


# --- means over documents


@lru_cache(maxsize=64)
def _draws(n: int, seed: int) -> Array:
    """Shares of each of ``n`` documents in resamples, (REPLICAS, n)."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=REPLICAS)
    return counts / n


def mean_interval(values: Array, seed: int = 0) -> Interval:
    """Of a mean over documents, (n,): percentiles of the bootstrap, at levels moved outwards.

    Plain percentiles are too narrow for few documents; by Hesterberg's expanded percentiles
    (2015, arXiv:1411.5279) they are as wide as Student's t of normal data.  Of fewer
    than ``FEW`` documents there are too few resamples, and it is Student's t itself.  No ends
    (nan) where nothing scatters.
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


def share_interval(values: Array) -> Interval:
    """Of a mean of shares, (n,) from 0 to 1: Clopper and Pearson's (1934) exact interval.

    Shares that are not all 0 or 1 scatter less than a binomial: for them it is wide.
    """
    n, hits, tail = len(values), float(values.sum()), (1 - LEVEL) / 2
    if not n:
        nothing = float("nan")
        return Interval(nothing, nothing, nothing, LEVEL, "Clopper-Pearson")
    low = special.betaincinv(hits, n - hits + 1, tail) if hits > 0 else 0.0
    high = special.betaincinv(hits + 1, n - hits, 1 - tail) if hits < n else 1.0
    return Interval(hits / n, float(low), float(high), LEVEL, "Clopper-Pearson")


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row a setting; where rates were tuned, a row a rate."""
    keys = [*BASE, "split", *METHOD, "inner_steps", "tuned_lr"]
    rows = []
    for key, group in table.groupby(keys, dropna=False):
        good = group[group["error"].isna()]
        documents = good.groupby("doc_sha256")[[*OUTCOMES, *ACCURACY, *SPENT]].mean()
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        row |= {"documents": len(documents), "seeds": good["seed"].nunique()}
        row |= {"records": len(group), "errors": len(group) - len(good)}
        for name in OUTCOMES:
            found = mean_interval(documents[name].dropna().to_numpy(), seed)
            row |= {name: found.estimate, f"{name}_sd": documents[name].std()}
            row |= {f"{name}_low": found.low, f"{name}_high": found.high}
        share = share_interval(documents["accuracy_after"].dropna().to_numpy())
        row |= {name: documents[name].mean() for name in (*ACCURACY, *SPENT)}
        row |= {"accuracy_after_low": share.low, "accuracy_after_high": share.high}
        row |= _gain(documents, share)
        rows.append({**row, "accepted": group["accepted"].astype(float).mean()})
    return pd.DataFrame(rows).astype(dict.fromkeys(WHOLE[:-1], "Int64"))


def _gain(documents: pd.DataFrame, share: Interval) -> dict[str, float]:
    """The interval of the accuracy gained, exact where all documents begin with the same share."""
    before = documents["accuracy_before"].dropna().unique()
    if len(before) != 1:
        return {}
    low, high = share.low - float(before[0]), share.high - float(before[0])
    return {"accuracy_gain_low": low, "accuracy_gain_high": high}


def _document_means(table: pd.DataFrame, keys: Sequence[str], names: list[str]) -> pd.DataFrame:
    return table.groupby([*keys, "doc_sha256"], dropna=False)[names].mean().reset_index()


def tested(table: pd.DataFrame) -> pd.DataFrame:
    """The records of test documents that have a result after some step."""
    good = (table["split"] == "test") & table["error"].isna()
    return table[good & (table["inner_steps"] > 0)]


# --- against the raw document


def paired(table: pd.DataFrame) -> pd.DataFrame:
    """Each method less ``lora_doc``, by test document, at equal rank, steps and tokens.

    Only seeds that both have are compared, and averaged within a document.  ``low`` to ``high``
    and ``p`` are Student's t over documents, ``wilcoxon_p`` the signed-rank test, ``holm_p`` is
    ``p`` by Holm (1979) over all comparisons of a base: those of self-edits, and apart from them
    those of the references.  A method without a rank stands beside each rank.
    """
    good, place = tested(table), [*BASE, "lora_rank", "inner_steps", "tokens_processed"]
    cells = _document_means(good, [*place, "method", "iteration", "seed"], OUTCOMES)
    raw = cells[cells["method"] == RAW].drop(columns=["method", "iteration"])
    others = cells[~cells["method"].isin(["none", RAW])]
    without = others["lora_rank"].isna()
    ranks = raw[[*BASE, "lora_rank"]].drop_duplicates()
    spread = others[without].drop(columns="lora_rank").merge(ranks, on=BASE)
    others = pd.concat([others[~without], spread]) if len(spread) else others[~without]
    both = others.merge(raw, on=[*place, "doc_sha256", "seed"], suffixes=("", "_raw"))
    for name in OUTCOMES:
        both[f"{name}_more"] = both[name] - both[f"{name}_raw"]
    keys = [*BASE, *METHOD, "inner_steps"]
    names = [f"{name}{end}" for name in OUTCOMES for end in ("", "_raw", "_more")]
    documents = _document_means(both, keys, names)
    rows = [
        {**dict(zip(keys, key, strict=True)), **_compared(group)}
        for key, group in documents.groupby(keys, dropna=False)
    ]
    if not rows:
        return pd.DataFrame()
    found = pd.DataFrame(rows).astype(dict.fromkeys(WHOLE[:-1], "Int64"))
    found["self_edit"] = ~found["method"].isin(REFERENCES)
    groups = found.groupby([*BASE, "self_edit"])["p"]
    found["holm_p"] = groups.transform(lambda p: holm(p.to_numpy(dtype=float)))
    clear = found["holm_p"] < 1 - LEVEL
    found["verdict"] = np.where(
        clear, np.where(found["difference"] > 0, "better", "worse"), "no evidence"
    )
    return found


def _compared(group: pd.DataFrame) -> dict[str, Any]:
    values = group["reward_more"].to_numpy()
    found, p = mean_t(values)
    more, _ = mean_t(group["forgetting_more"].to_numpy())
    return {
        "documents": len(values),
        **{
            f"{name}{end}": group[f"{name}{end}"].mean()
            for name in OUTCOMES
            for end in ("", "_raw")
        },
        "difference": found.estimate,
        "low": found.low,
        "high": found.high,
        "p": p,
        "wilcoxon_p": wilcoxon(values),
        "forgetting_difference": more.estimate,
        "forgetting_low": more.low,
        "forgetting_high": more.high,
    }


def mean_t(values: Array) -> tuple[Interval, float]:
    """Student's t of a mean, (n,), and its p against zero: 1 where nothing scatters."""
    n, nothing = len(values), float("nan")
    mean = float(values.mean()) if n else nothing
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else nothing
    if not error > 0:
        return Interval(mean, nothing, nothing, LEVEL, "t (documents)"), 1.0
    reach = float(special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(mean / error)))
    return Interval(mean, mean - reach, mean + reach, LEVEL, "t (documents)"), p


def wilcoxon(values: Array) -> float:
    """p of the signed-rank test; 1 where all differences are zero."""
    from scipy import stats  # slow to import

    return float(stats.wilcoxon(values).pvalue) if np.any(values) else 1.0


def holm(p: Array) -> Array:
    """Holm's correction of p values, (n,): valid however the tests depend on each other."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty_like(p)
    found[order] = np.minimum(stepped, 1.0)
    return found


# --- laws in the steps


def laws(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """reward = c·k^a of each method, by its means over test documents; else the reason why not."""
    good, rows = tested(table), []
    for key, group in good[good["method"] != "none"].groupby([*BASE, *METHOD], dropna=False):
        means = group.pivot_table(index="doc_sha256", columns="inner_steps", values="reward")
        row = dict(zip([*BASE, *METHOD], key, strict=True))
        rows.append(row | power_law(means.dropna(), seed))
    return (
        pd.DataFrame(rows).astype({"iteration": "Int64", "lora_rank": "Int64"})
        if rows
        else (pd.DataFrame())
    )


def power_law(rewards: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """The law of one method, and intervals by the bootstrap over documents.

    ``rewards``: documents by k.  Least squares of the logarithm of the means; ``left`` is the
    largest ratio of a mean to the law, less 1.
    """
    none = dict.fromkeys(("c", "c_low", "c_high", "a", "a_low", "a_high", "left"), float("nan"))
    row: dict[str, Any] = {"documents": len(rewards), **none, "reason": ""}
    steps, means = rewards.columns.to_numpy(dtype=float), rewards.mean().to_numpy()
    reason = _why_none(steps, means, len(rewards))
    if reason:
        return {**row, "reason": reason}
    found = fit(
        pd.DataFrame({"k": steps, "reward": means}),
        "power",
        loss="reward",
        x="k",
        estimator="least_squares",
    )
    row |= {"c": found.parameters["A"], "a": -found.parameters["alpha"]}
    row["left"] = float(np.expm1(np.abs(found.residuals).max()))
    for k, at in zip(steps, means * np.exp(-found.residuals), strict=True):
        band = mean_interval(rewards[k].to_numpy(), seed)
        if at < band.low or at > band.high:  # nothing is said where there is no band
            off = f"{row['left']:.0%} at most"
            reason = f"the law leaves the interval of the mean at k = {k:g}; off by {off}"
            return {**row, **none, "reason": reason}
    if len(rewards) < FEW:
        return {**row, "reason": f"{count(len(rewards), 'document')}: too few for an interval"}
    replicas = _draws(len(rewards), seed) @ rewards.to_numpy()
    if (replicas <= 0).any():
        return {**row, "reason": "a mean may be zero or less: no interval"}
    x = np.log(steps)
    slopes = np.log(replicas) @ ((x - x.mean()) / np.sum((x - x.mean()) ** 2))
    constants = np.exp(np.log(replicas).mean(axis=1) - slopes * x.mean())
    levels = _expanded(len(rewards))
    for name, values in (("c", constants), ("a", slopes)):
        row[f"{name}_low"], row[f"{name}_high"] = np.quantile(values, levels)
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
    """By iteration, at the largest k: the mean reward of the edits of a document, and its best."""
    rounds = table[table["method"].str.startswith("restem")]
    rounds = rounds[rounds["inner_steps"] == rounds.groupby(BASE)["inner_steps"].transform("max")]
    rows = []
    keys = [*BASE, "lora_rank", "split", "iteration"]
    for key, group in rounds.groupby(keys, dropna=False):
        good = group[group["error"].isna()]
        if good.empty:
            continue
        documents = pd.DataFrame([_proposed(part) for _, part in good.groupby("doc_sha256")])
        row = dict(zip(keys, key, strict=True))
        row |= {"inner_steps": group["inner_steps"].iloc[0], "documents": len(documents)}
        row["edits"] = documents["size"].mean()
        for name, column in (("mean", "mean"), ("best", "max")):
            found = mean_interval(documents[column].to_numpy(), seed)
            row |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
        learned = group.groupby("doc_sha256")["accepted"].max().astype(float)
        rows.append({**row, "accepted": learned.mean()})  # of the documents
    return pd.DataFrame(rows)


def _proposed(records: pd.DataFrame) -> dict[str, float]:
    """Of the edits of a document, each as often as it was proposed."""
    edits = records.groupby("edit_id").agg({"reward": "mean", "times_proposed": "max"})
    times = edits["times_proposed"].fillna(1)
    mean = float(np.average(edits["reward"], weights=times))
    return {"mean": mean, "max": edits["reward"].max(), "size": times.sum()}


def pareto_front(forgetting: Array, reward: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of points, (n,): whether no other forgets no more and gains no less, and one strictly."""
    front = np.zeros(len(reward), dtype=bool)
    best, at = -np.inf, np.inf
    for i in np.lexsort((-reward, forgetting)):
        front[i] = reward[i] > best or (reward[i] == best and forgetting[i] == at)
        if reward[i] > best:
            best, at = reward[i], forgetting[i]
    return front
