"""Takes finished studies into this folder, and writes the numbers of all of them into their pages.

python experiments/record.py grid=outputs/grid-laptop    takes over its runs, and fits them
python experiments/record.py grid                        fits the runs that are here, again
python experiments/record.py                             the numbers of every page, again

fit.json and the figures come from runs.csv by ``python -m tinygpt.fit table=``, and what stands
between the marks of a README from these two, nowhere else.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tinygpt.adaptation.analysis import RAW, by_order
from tinygpt.fileio import write_text
from tinygpt.scaling import Fit, delta, fit, intervals, of_loss, read_table
from tinygpt.scaling.drawing import STYLE
from tinygpt.scaling.runs import comparable
from tinygpt.scaling.wording import equation, estimate, number, percent, reach, variables

HERE = Path(__file__).parent
FIGURES = ("scaling", "extrapolation", "isoflop", "contours", "residuals")
MARKS = re.compile(r"(<!-- numbers -->\n).*?(<!-- end -->\n)", re.S)
# Studies that compare settings and fit no law: what tells the lines apart, what runs along a line,
# and the loss that compares them.
COMPARED: dict[str, tuple[list[str], str, str]] = {
    "context": ([], "max_seq_len", "final_val_loss"),
    "depth": ([], "n_layers", "final_val_loss"),
    "learning_rate": (["parametrization", "d_model"], "learning_rate", "final_val_loss"),
    "optimizer": (["optimizer"], "learning_rate", "final_val_loss"),
    "seeds": ([], "seed", "final_val_loss"),
    "tokenizer": ([], "vocab_size", "final_val_bits_per_byte"),
}
WHERE = {"data": "train_tokens <= unique_train_tokens"}  # the runs of a law, where not all
ADAPTED = "adaptation"
TABLES = ("adaptation_summary.csv", "adaptation_paired.csv", "adaptation_laws.csv")
PICTURES = ("adaptation_laws", "pareto_forgetting", "restem")
Facts = dict[str, Any]


def take(name: str, outputs: Path) -> None:
    """Copies the runs of the study in ``outputs``; of adaptations tables and figures."""
    (HERE / name).mkdir(exist_ok=True)
    if name == ADAPTED:
        for file in (*TABLES, *(f"{figure}.png" for figure in PICTURES)):
            shutil.copyfile(outputs / "fit" / file, HERE / name / file)
    else:
        shutil.copyfile(outputs / "sweep_summary.csv", HERE / name / "runs.csv")


def fit_again(name: str) -> None:
    """The law through runs.csv, as the command has it."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"table={HERE / name / 'runs.csv'}", f"output_dir={folder}"]
        words += [f"where={WHERE[name]}"] if name in WHERE else []
        subprocess.run([sys.executable, "-m", "tinygpt.fit", *words], check=True)
        for file in ("fit.json", *(f"{figure}.png" for figure in FIGURES)):
            if (found := Path(folder) / f"fit-{name}-runs" / file).exists():
                shutil.copyfile(found, HERE / name / file)


def cost(runs: pd.DataFrame) -> str:
    """What it took to train the runs; steps that one took over from another count once."""
    own = 1 - runs["branched_at_step"].fillna(0) / runs["total_steps"]
    hours = (runs["seconds_training"] * runs["threads"] * own).sum() / 3600
    took = f"{hours:.1f} core-hours" if hours >= 1 else f"{60 * hours:.0f} core-minutes"
    return f"{took}, {number((runs['flops_exact'] * own).sum(), 2)} FLOPs"


def head(runs: pd.DataFrame) -> str:
    commits = ", ".join(sorted({str(commit)[:7] for commit in runs["git_commit"]}))
    text = ", ".join(sorted({str(one)[:12] for one in runs["data_fingerprint"]}))
    return (
        f"{len(runs)} runs, {runs['seed'].nunique()} seeds: {cost(runs)} (commit {commits}; "
        f"fingerprint of the text {text})."
    )


# --- a law


def refit(runs: pd.DataFrame, facts: Facts, law: str = "") -> Fit:
    """The study's law, or another, through ``runs``, in the way of its fit.json; a part of its runs
    without weights."""
    columns = {name: one["column"] for name, one in facts["variables"].items()}
    how = {"estimator": facts["method"]["estimator"], "limit": facts["method"]["threshold"]}
    weights = facts["method"].get("weights") or []
    if len(weights) == len(runs):
        how["weights"] = np.array(weights)
    return fit(runs, law or facts["law"], loss=facts["loss"], **how, **columns)


def used(name: str, runs: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """Those that the law goes through."""
    return comparable(runs, facts["loss"], WHERE.get(name))[0]


def law_of(runs: pd.DataFrame, facts: Facts) -> str:
    """The law through ``runs``: its numbers, its prediction, its checklist."""
    law = refit(runs, facts)
    words = variables({name: one["meaning"] for name, one in facts["variables"].items()})
    found = intervals(law).items()
    rows = [(name, estimate(law.parameters[name], one), reach(one)) for name, one in found]
    table = markdown(["", "estimate", "95 % interval"], rows)
    told = predicted(facts)
    return "\n\n".join(
        [
            f"**{equation(law.optimum.law, law.parameters)}** ({words})",
            table,
            *told[:1],
            checklist(facts),
        ]
    )


def predicted(facts: Facts) -> tuple[str, ...]:
    """What the forecast from the runs below the cut said of those above: a text and a number."""
    held = facts["held_out"]
    if held is None:
        return ()
    x = facts["variables"].get("x")
    unit = x["meaning"] if x else "FLOPs"
    top, beyond = held["largest"], f"×{number(held['distance'], 2)}"
    off = percent(abs(top["predicted"] / top["measured"] - 1))
    text = (
        f"**Prediction.** From the runs of up to {number(held['cut'], 2)} {unit} alone, the "
        f"forecast for the largest, {beyond} beyond, was {top['predicted']:.3f} "
        f"({top['low']:.3f} to {top['high']:.3f}). The measured loss is "
        f"{top['measured']:.3f}: **off by {off}**. All {held['runs']} runs "
        f"held out are off by {percent(held['error'])} on average, at most "
        f"{percent(held['worst'])}; {held['within']:.0%} of them lie in their 95 % interval "
        f"(±{percent(held['half_width'])}). A guess as low as the best smaller run "
        f"is off by {percent(held['best_cheaper'])}, a plane in the logarithms by "
        f"{percent(held['plane'])}."
    )
    return text, f"{off} at {beyond}"


def checklist(facts: Facts) -> str:
    """How many lines of the checklist pass, and those that do not."""
    failed = [one for one in facts["checks"] if one["passed"] is False]
    passed = sum(one["passed"] is True for one in facts["checks"])
    lines = [f"- {one['name']}: no; {one.get('figure') or one['detail']}" for one in failed]
    return "\n".join(
        [f"**Checklist.** {passed} pass, {len(failed)} fail{':' if failed else '.'}", *lines]
    )


# --- what a law alone does not say


def repeated(runs: pd.DataFrame, facts: Facts) -> str:
    """What text read again is worth: the new text that gave the same loss, by the logarithm between
    two amounts of it; in brackets by each seed of the new text alone."""
    loss = facts["loss"]
    once = used("data", runs, facts)
    again = runs[runs["train_tokens"] > runs["unique_train_tokens"]]

    def worth(some: pd.DataFrame, at: float) -> float:
        """The tokens read once that come to the loss ``at``."""
        curve = some.groupby("train_tokens")[loss].mean()
        logs = np.log(curve.index.to_numpy(float))
        return float(np.exp(np.interp(-at, -curve.to_numpy(), logs)))

    rows = []
    for unique, some in again.groupby("unique_train_tokens"):
        read, mean = some["train_tokens"].iloc[0], some[loss].mean()
        spread = f"{mean:.4f} ± {np.ptp(some[loss]) / 2:.4f}"
        found = [worth(part, mean) for part in (once, *(one for _, one in once.groupby("seed")))]
        share, *seeds = ((tokens - unique) / (read - unique) for tokens in found)
        told = f"{share:.0%} ({min(seeds):.0%} to {max(seeds):.0%})"
        rows.append((f"{unique:,}", f"{read / unique:.0f}", spread, number(found[0], 3), told))
    new = once.groupby("train_tokens")[loss].mean()[read]
    rows.append((f"{read:,}", "1", f"{new:.4f}", "", ""))
    header = ("unique tokens", "epochs", loss, "as much new text", "a repeat is worth")
    return f"**Repetition**: {read:,} tokens in all.\n\n{markdown(header, rows)}"


def ways(runs: pd.DataFrame, facts: Facts) -> str:
    """The best split of the largest budget, by each way of reading it off ``runs``."""
    found = facts["frontier"]
    rows = [(one["way"], *(_between(one, name) for name in "and")) for one in found["ways"]]
    table = markdown(("", "exponent of N*", "N*", "D*"), rows)
    missing = [f"{way}: {why}." for way, why in found["missing"].items()]
    budget = number(runs["flops_exact"].max(), 2)
    return "\n\n".join([f"**The best split** of {budget} FLOPs:", table, *missing])


def _between(one: Facts, name: str) -> str:
    low, high = (number(one[f"{name}_{end}"], 2) for end in ("low", "high"))
    return f"{number(one[name], 2)} ({low} to {high})"


def beside_grid(runs: pd.DataFrame, facts: Facts) -> str:
    """The same settings under a cosine of their own: loss by loss, law by law, and the cost."""
    every, loss = read("grid")[0], facts["loss"]
    place = ["d_model", "train_tokens", "seed"]
    both = runs.merge(every, on=place, suffixes=("", "_grid"))
    more = both[loss] / both[f"{loss}_grid"] - 1
    largest = every[every["flops_exact"] == every["flops_exact"].max()]
    told = []
    for some in (runs, every.merge(runs[place], on=place)):
        law = refit(some, facts)
        at = {name: float(largest[column].iloc[0]) for name, column in law.columns.items()}
        told.append(delta(law, of_loss(law, **at)))
    by_trunks, by_cosines = (f"{one.estimate:.3f} ({reach(one)})" for one in told)
    return (
        f"**Beside `grid`**, where each of the same {len(both)} settings has a cosine of its own: "
        f"the loss is {more.mean():+.2%} on average ({more.min():+.2%} to {more.max():+.2%}), for "
        f"{1 - facts['shared_trunks']['saved']:.0%} of the compute. For the most expensive "
        f"run of `grid`, twice as long as any here, whose loss was {largest[loss].mean():.3f}, the "
        f"law says {by_trunks} through these runs and {by_cosines} through those of `grid`."
    )


MORE: dict[str, Callable[[pd.DataFrame, Facts], str]] = {
    "cooldown": beside_grid,
    "data": repeated,
    "isoflop": ways,
}


# --- a comparison


def compared(name: str, runs: pd.DataFrame) -> str:
    """A row a setting, or a line with its best setting: mean of the seeds ± half their range."""
    lines, along, loss = COMPARED[name]
    if not lines:
        return markdown([along, loss], _means(runs.groupby(along)[loss]))
    rows = []
    for labels, some in runs.groupby(lines):
        means = some.groupby(along)[loss].mean()
        ((best, text),) = _means(some[some[along] == means.idxmin()].groupby(along)[loss])
        others = ", ".join(f"{at:g}: {mean:.4f}" for at, mean in means.drop(best).items())
        rows.append((*labels, f"{best:g}", text, others))
    return markdown([*lines, f"best {along}", loss, "others"], rows)


def _means(groups: Any) -> list[tuple[Any, str]]:
    return [
        (at, f"{seeds.mean():.4f} ± {(seeds.max() - seeds.min()) / 2:.4f}") for at, seeds in groups
    ]


def adapted() -> str:
    """Of test documents, at the largest rank after the most steps; and how edits compared."""
    found, paired = (pd.read_csv(HERE / ADAPTED / file) for file in TABLES[:2])
    rank, steps = found["lora_rank"].max(), found["inner_steps"].max()
    ended = (found["split"] == "test") & (found["inner_steps"] == steps)
    last = found[ended & found["lora_rank"].fillna(rank).eq(rank)]
    rows = [
        (f"{parameters:,}", f"`{method}`", *_outcome(by_method.loc[method]))
        for parameters, base in last.groupby("base_parameters")
        for by_method in [base.set_index("method")]
        for method in by_order(by_method.index)
    ]
    header = ("parameters", "method", "reward, nats", "forgetting, nats", "answered")
    edits = paired[paired["self_edit"]]
    verdicts = []
    for parameters, part in edits.groupby("base_parameters"):
        counts = sorted(part["verdict"].value_counts().items())
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts)
        verdicts.append(f"- {parameters:,} parameters: {told}")
    flops = (found["flops_est"] * found["records"])[found["inner_steps"] == steps].sum()
    return (
        f"{found['records'].sum():,} records, {found['seeds'].max()} seeds, "
        f"{last['documents'].max()} test facts: {number(flops, 2)} FLOPs. "
        f"After {steps} steps at rank {rank:g}, means with 95 % intervals:\n\n"
        f"{markdown(header, rows)}\n\n"
        f"Self-edits against `{RAW}`, paired by document, at every rank, number of steps and "
        f"iteration (p by Holm below 0.05):\n\n" + "\n".join(verdicts) + "\n"
    )


def _outcome(row: pd.Series) -> tuple[str, str, str]:
    reward, forgetting = (
        f"{row[name]:+.2f} ({row[f'{name}_low']:+.2f} to {row[f'{name}_high']:+.2f})"
        for name in ("reward", "forgetting")
    )
    low, high = row["accuracy_after_low"], row["accuracy_after_high"]
    return reward, forgetting, f"{row['accuracy_after']:.0%} ({low:.0%} to {high:.0%})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(name: str, runs: pd.DataFrame) -> None:
    """The loss of every run, a line through the means of the seeds."""
    lines, along, loss = COMPARED[name]
    plt.rcParams.update(STYLE)
    panels = list(runs.groupby(lines[0])) if len(lines) > 1 else [("", runs)]
    figure, every = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), sharey=True, squeeze=False
    )
    for axes, (title, part) in zip(every[0], panels, strict=True):
        groups = list(part.groupby(lines[-1])) if lines else [("", part)]
        colours = plt.cm.viridis(np.linspace(0, 0.9, len(groups)))
        if lines == ["optimizer"]:  # names, which have no order
            colours = plt.cm.tab10(range(len(groups)))
        for colour, (label, some) in zip(colours, groups, strict=True):
            mean = some.groupby(along)[loss].mean()
            axes.plot(mean.index, mean, "-", color=colour, lw=1, label=label)
            axes.plot(some[along], some[loss], "o", color=colour, ms=3.5)
        axes.set_xscale("log")
        tried = sorted(part[along].unique())
        if len(tried) < 10:
            axes.set_xticks(tried, [f"{value:g}" for value in tried])
            axes.set_xticks([], minor=True)
        axes.set(xlabel=along.replace("_", " "), title=title)
    every[0, 0].set_ylabel(loss.replace("_", " "))
    if runs[loss].max() > 2 * runs[loss].min():
        every[0, 0].set_yscale("log")
        every[0, 0].yaxis.set_minor_formatter("{x:g}")
        every[0, 0].yaxis.set_major_formatter("{x:g}")
    if lines:
        every[0, -1].legend(title=lines[-1].replace("_", " "))
    figure.savefig(HERE / name / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


# --- the pages


def read(name: str) -> tuple[pd.DataFrame, Facts | None]:
    """The runs of a study, and its fit.json where there is a law."""
    facts = HERE / name / "fit.json"
    return read_table(HERE / name / "runs.csv"), json.loads(
        facts.read_text()
    ) if facts.exists() else None


def page(name: str) -> str:
    """The numbers of a study, as Markdown."""
    if name == ADAPTED:
        return adapted()
    runs, facts = read(name)
    if facts is None:
        return f"{head(runs)}\n\n{compared(name, runs)}\n"
    more = [MORE[name](runs, facts)] if name in MORE else []
    body = "\n\n".join([law_of(used(name, runs, facts), facts), *more])
    return f"{head(runs)}\n\n{body}\n"


def table(names: Iterable[str]) -> str:
    """All studies that have a law, a line each."""
    rows = []
    for name in names:
        runs, facts = read(name)
        if facts is None:
            continue
        runs_used = used(name, runs, facts)
        law = refit(runs_used, facts)
        found = intervals(law)
        exponents = [
            f"{one} {estimate(law.parameters[one], found[one])} ({reach(found[one])})"
            for one in law.law.exponents
        ]
        passed = [one["passed"] for one in facts["checks"]]
        checks = f"{passed.count(True)} of {passed.count(True) + passed.count(False)}"
        told = predicted(facts)
        rows.append(
            (
                f"[{name}]({name}/README.md)",
                f"`{equation(law.optimum.law, law.parameters)}`",
                "<br>".join(exponents),
                told[1] if told else "–",
                checks,
                cost(runs),
            )
        )
    header = ["study", "law", "exponents, 95 %", "most expensive runs, predicted"]
    header += ["checks passed", "cost"]
    return markdown(header, rows) + "\n"


def written(text: str, numbers: str) -> str:
    """A page with its numbers."""
    return MARKS.sub(lambda marks: f"{marks[1]}{numbers}{marks[2]}", text)


def main() -> None:
    for word in sys.argv[1:]:
        name, _, outputs = word.partition("=")
        if outputs:
            take(name, Path(outputs))
        if name not in {*COMPARED, ADAPTED}:
            fit_again(name)
    studies = sorted(path.parent.name for path in HERE.glob("*/runs.csv"))
    tables = sorted(path.parent.name for path in HERE.glob(f"*/{TABLES[0]}"))
    pages = {HERE / name / "README.md": page(name) for name in studies + tables}
    pages[HERE / "README.md"] = table(studies)
    for name in set(studies) & set(COMPARED):
        draw(name, read(name)[0])
    for path, numbers in pages.items():
        if path.exists():
            write_text(path, written(path.read_text(), numbers))
        else:
            print(f"{path.relative_to(HERE)} is not written yet; its numbers:\n\n{numbers}")


if __name__ == "__main__":
    main()
