"""Compares laws within a budget with two grids of 50 runs, made anew for the same recipe.

python experiments/budget/grids.py books=books/          trains the grid, times it and a plain
python experiments/budget/grids.py tinystories=stories/  loop, then finds three laws; an hour of a
                                                         quiet machine; nothing is done twice
python experiments/budget/grids.py                       scores from tables/, the page, the figure

A law has a quarter of the grid's core-minutes.  It predicts the grid's six most expensive settings,
which it does not see, and so do the grid's 38 cheaper runs, by the same forecast.  Both are scored
on the grid's own runs of these settings and on two other seeds, whose luck neither has met.  A
plain loop trains the grid's runs one after the other with all threads, the cheapest first.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator
from torch import Tensor

from tinygpt.config import ConfigError
from tinygpt.fileio import write_text
from tinygpt.scaling.drawing import BLUE, GREY, RED, STYLE
from tinygpt.scaling.forecast import Forecast, HeldOut, Sample, forecast, groups_of, hold_out
from tinygpt.scaling.runs import load_runs

HERE = Path(__file__).parent
RUNS, SECONDS = HERE / "tables" / "grid_runs.csv", HERE / "tables" / "grid_seconds.csv"
SCORES = HERE / "grids.csv"
MARKS = re.compile(r"(<!-- grids -->\n).*?(<!-- end -->\n)", re.S)
OUTPUTS = Path("outputs")
WIDTHS, LENGTH, VOCABULARY = (16, 32, 48, 64, 96), 256, 1024
LAW_SEEDS = (1, 11, 21)  # of the whole procedure: where its runs' seeds begin
OTHER_SEEDS = (201, 202)  # of the most expensive settings
LAWS = ("chinchilla", "chinchilla_tied", "coupled", "kaplan_constant")
BATCH = {"books": 512, "tinystories": 256}  # what a law of so much text chooses
TOKENS = {
    "books": (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000),
    "tinystories": (70_000, 140_000, 280_000, 560_000, 1_120_000),
}
CLOSE = 0.01  # error at the most expensive setting


def keys(text: str, path: str) -> list[str]:
    """Return what all runs have in common, those of the grid and those of the laws."""
    return [
        *("data=custom", f"data.path={path}", f"data.name={text}", "data.max_tokens=null"),
        # a law of so small a text would set aside more of it, and be tried on another one
        *("data.val_fraction=0.05", "schedule.warmup_steps=40"),
        *("tokenizer=bpe", f"tokenizer.vocab_size={VOCABULARY}", "optim.learning_rate=0.003"),
        *(f"train.batch_tokens={BATCH[text]}", "model.position=rope"),
    ]


def command(name: str, *words: str) -> None:
    """Run a command of tinygpt."""
    subprocess.run([sys.executable, "-m", f"tinygpt.{name}", *words], check=True)


def train_grid(text: str, path: str) -> Path:
    """Train the grid by the recipe that laws within a budget have, and return its folder."""
    common = ["experiment=grid", "schedule=wsd", "schedule.min_ratio=0", "fit=false"]
    common += ["train.sample_tokens=0", f"train.eval_every={10**15}", *keys(text, path)]
    tokens = TOKENS[text]
    words = [*common, f"train.tokens={','.join(map(str, tokens))}", f"study=grid-{text}"]
    command("run", *words)
    # again 400 steps of each size with both workers busy: what the runs cost on a quiet machine
    words = [*common, f"train.tokens={400 * BATCH[text]}", f"study=grid-{text}-seconds"]
    command("run", *words)
    # the settings of the twelve most expensive runs, with other seeds
    words = [*common, f"study=grid-{text}-other", f"seed={','.join(map(str, OTHER_SEEDS))}"]
    for length, widths in ((tokens[-1], (48, 64, 96)), (tokens[-2], (64, 96)), (tokens[-3], (96,))):
        sizes = [f"{{model.d_model:{width},model.n_heads:{width // 16}}}" for width in widths]
        together = f"sweep.laptop.together=[{','.join(sizes)}]"
        command("run", *words, f"train.tokens={length}", together)
    return OUTPUTS / f"grid-{text}"


def plain_seconds(width: int, batch_tokens: int, steps: int = 150) -> float:
    """Return the seconds of a step of the plain loop, by all threads."""
    sys.path.insert(0, str(HERE.parent / "speed"))
    from plain import PlainGPT, Recipe, Shape, batches, training

    model = PlainGPT(Shape(2, width, width // 16, LENGTH, VOCABULARY))
    recipe = Recipe(3e-3, 0.0, 40, 10**6, 0.1, (0.9, 0.95), 1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(VOCABULARY, size=10**6, dtype=np.uint16).tofile(path)
        get_batch = batches(path, "uint16", batch_tokens // LENGTH, LENGTH, seed=0)

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = model(x, y)[1]
            return loss

        loop = training(model, loss_of, get_batch, recipe, contextlib.nullcontext())
        for _ in range(20):
            next(loop)
        begun = time.perf_counter()
        for _ in range(steps):
            next(loop)
        return (time.perf_counter() - begun) / steps


def time_steps(text: str) -> pd.DataFrame:
    """Return the seconds of a step of each size: of a worker here, and of the plain loop."""
    runs = load_runs(OUTPUTS / f"grid-{text}-seconds")
    own = runs["seconds_training"] / runs["total_steps"]
    rows = [
        {
            "text": text,
            "d_model": width,
            "own": float(own[runs["d_model"] == width].mean()),
            "plain": plain_seconds(width, BATCH[text]),
        }
        for width in WIDTHS
    ]
    return pd.DataFrame(rows)


def rows_of(folder: Path, text: str, study: str, minutes: dict[str, float]) -> pd.DataFrame:
    """Return what the scores need of the runs in a folder."""
    runs = load_runs(folder)
    if minutes:
        runs = runs[runs["run_name"].isin(minutes)]
    names = {"parameters_non_embedding": "N", "train_tokens": "D", "flops_exact": "flops"}
    table = runs.rename(columns={**names, "final_val_loss": "loss", "total_steps": "steps"})
    table = table[["d_model", "seed", "steps", "N", "D", "flops", "loss"]].copy()
    table.insert(0, "text", text)
    table.insert(1, "study", study)
    table["minute"] = runs["run_name"].map(minutes) if minutes else float("nan")
    return table


def find_law(text: str, path: str, seed: int, minutes: float, flops: float) -> pd.DataFrame:
    """Find a law within so many minutes for a target of so many FLOPs, and return its runs."""
    study = f"law-{text}-{seed}"
    if not (OUTPUTS / study / "fit").exists():
        words = [f"minutes={minutes:.2f}", f"target.flops={flops:g}", f"seed={seed}"]
        command("law", *words, f"study={study}", *keys(text, path))
    lines = (OUTPUTS / study / "design.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    names = {line["row"]: line["run"] for line in found if line["event"] == "choose"}
    ends = {names[line["row"]]: line["at"] / 60 for line in found if line["event"] == "end"}
    said = json.loads((OUTPUTS / study / "prediction.json").read_text())
    tested = next(line["at"] / 60 for line in found if line["event"] == "test")
    runs = load_runs(OUTPUTS / study)
    is_test = runs["seed"].isin(said["seeds"])
    ends |= dict.fromkeys(runs.loc[is_test, "run_name"], tested)
    return rows_of(OUTPUTS / study, text, study, ends)


def record(text: str, path: str) -> None:
    """Train whatever is missing, and write what the scores need."""
    folder = train_grid(text, path)
    seconds = time_steps(text)
    tables = [rows_of(folder, text, "grid", {})]
    tables += [rows_of(folder.with_name(f"{folder.name}-other"), text, "other", {})]
    grid = tables[0].merge(seconds, on=["text", "d_model"])
    minutes = float((grid["steps"] * grid["own"]).sum()) / 60 / 4 / 2  # a quarter, by two workers
    top = float(grid["flops"].max())
    tables += [find_law(text, path, seed, minutes, top) for seed in LAW_SEEDS]
    for place, new in ((RUNS, pd.concat(tables)), (SECONDS, seconds)):
        if place.exists():
            old = pd.read_csv(place)
            new = pd.concat([old[old["text"] != text], new])
        write_text(place, new.to_csv(index=False, lineterminator="\n"))


# --- the scores


def sample_of(table: pd.DataFrame) -> Sample:
    table = table.reset_index(drop=True)
    groups = groups_of([table["N"].astype(str) + " " + table["D"].astype(str)])
    size, trunks = table["flops"].to_numpy(dtype=float), None
    if (table["study"] != "grid").all():  # runs of a law share trunks
        trunks = table.groupby(["d_model", "seed"]).ngroup().to_numpy()
    return Sample(table, LAWS, {"N": "N", "D": "D"}, "loss", size, groups, trunks=trunks)


def errors(made: Forecast, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted / measured - 1 of some runs, and whether each is in its interval."""
    places = {name: table[name].to_numpy(dtype=float) for name in ("N", "D")}
    log_loss, half = made.at(places, table["flops"].to_numpy(dtype=float))
    off = log_loss - np.log(table["loss"].to_numpy())
    return np.expm1(off), np.abs(off) <= half


def settings_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting, its loss the geometric mean over the seeds."""
    runs = runs.assign(loss=np.log(runs["loss"]))
    means: pd.DataFrame = runs.groupby(["N", "D"], as_index=False)[["flops", "loss"]].mean()
    return means.assign(loss=np.exp(means["loss"]))


def most_expensive(table: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the most expensive setting."""
    return table[table["flops"] == table["flops"].max()]


def follow(runs: pd.DataFrame, top: pd.DataFrame) -> Iterator[tuple[float, float]]:
    """Yield the minute at which each run ended, and the error at the most expensive setting of
    what the runs up to then predict."""
    runs = runs.sort_values("minute", kind="stable")
    for count in range(9, len(runs) + 1):
        with contextlib.suppress(ConfigError):
            made = forecast(sample_of(runs.iloc[:count]))
            yield float(runs["minute"].iloc[count - 1]), float(np.abs(errors(made, top)[0]).mean())


def close_at(path: list[tuple[float, float]]) -> float:
    """Return the minute from which on the error stays within 1 %; inf if it never does."""
    outside = [i for i, (_, error) in enumerate(path) if error > CLOSE]
    first = outside[-1] + 1 if outside else 0
    return path[first][0] if first < len(path) else float("inf")


def by_plain_loop(grid: pd.DataFrame) -> pd.DataFrame:
    """Return the grid's runs but for the most expensive setting, with the minute at which each
    would have ended in the plain loop, the cheapest first."""
    runs = grid.drop(most_expensive(grid).index).sort_values("flops", kind="stable")
    return runs.assign(minute=(runs["steps"] * runs["plain"]).cumsum() / 60)


def score() -> tuple[pd.DataFrame, dict[str, list[list[tuple[float, float]]]]]:
    """Return a row for each study, and for each text the path of every study."""
    runs, seconds = pd.read_csv(RUNS), pd.read_csv(SECONDS)
    rows, paths = [], dict[str, list[list[tuple[float, float]]]]()
    for text, table in runs.groupby("text", sort=False):
        grid = table[table["study"] == "grid"].merge(seconds, on=["text", "d_model"])
        held = hold_out(sample_of(grid))
        assert isinstance(held, HeldOut)
        top, other = grid[held.above], table[table["study"] == "other"]
        settings = settings_of(other)
        assert settings[["N", "D"]].equals(settings_of(top)[["N", "D"]])
        top_setting = most_expensive(settings)
        cost = float((grid["steps"] * grid["own"]).sum()) / 60
        path = list(follow(by_plain_loop(grid), top_setting))
        paths[str(text)] = [path]
        whole = float((grid["steps"] * grid["plain"]).sum()) / 60
        row = {"text": text, "study": "grid", "core_minutes": cost, "runs": len(grid) - len(top)}
        row |= marks(held.below, top, other)
        rows.append(row | {"close_at": close_at(path), "whole": whole})
        for study, own in table[table["study"].str.startswith("law")].groupby("study", sort=False):
            path = list(follow(own, top_setting))
            paths[str(text)].append(path)
            row = {"text": text, "study": study, "core_minutes": 2 * own["minute"].max()}
            row |= {"runs": len(own), **marks(forecast(sample_of(own)), top, other)}
            rows.append(row | {"close_at": close_at(path), "whole": own["minute"].max()})
    return pd.DataFrame(rows), paths


def marks(made: Forecast, top: pd.DataFrame, other: pd.DataFrame) -> dict[str, float]:
    """Return how far a forecast is off for the grid's most expensive runs and the other seeds'."""
    settings = settings_of(other)
    off, _ = errors(made, settings)
    return {
        "error_own": float(np.abs(errors(made, top)[0]).mean()),
        "error": float(np.abs(off).mean()),
        "worst": float(np.abs(off).max()),
        "inside": float(errors(made, other)[1].mean()),
        "top": float(np.abs(errors(made, most_expensive(settings))[0]).mean()),
    }


def markdown(scores: pd.DataFrame) -> str:
    header = ["text", "runs made by", "core-minutes", "runs", "error of the grid's 12, %"]
    header += ["error of 6 settings, %", "worst, %", "in interval, %", "most expensive, %"]
    header += ["within 1 % from minute"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in scores.to_dict("records"):
        who = "grid, cheaper 38" if row["study"] == "grid" else f"law, seed {row['study'][-2:]}"
        at = f"{row['close_at']:.1f}" if np.isfinite(row["close_at"]) else "never"
        at += " (plain loop)" if row["study"] == "grid" else ""
        cells = [row["text"], who.replace("-", ""), f"{row['core_minutes']:.1f}", row["runs"]]
        cells += [f"{100 * row[name]:.2f}" for name in ("error_own", "error", "worst")]
        cells += [f"{100 * row['inside']:.0f}", f"{100 * row['top']:.2f}", at]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def draw(paths: dict[str, list[list[tuple[float, float]]]]) -> None:
    """Draw the error at the most expensive setting against minutes."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(paths), figsize=(9, 3.2), squeeze=False)
        for panel, (text, each) in zip(axes[0], paths.items(), strict=True):
            for i, path in enumerate(each):
                words = "the grid, by a plain loop" if i == 0 else "laws, three seeds"
                panel.plot(
                    [minute for minute, _ in path],
                    [100 * max(error, 1e-4) for _, error in path],
                    color=RED if i == 0 else BLUE,
                    label=words if i < 2 else None,
                )
            panel.axhline(100 * CLOSE, color=GREY, lw=0.8, ls=":")
            panel.set(xscale="log", yscale="log", title=text, xlabel="minutes", ylim=(0.4, 20))
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0][0].set(ylabel="error at the most expensive setting (%)")
        axes[0][0].legend()
        figure.savefig(HERE / "grids.png", dpi=160)


def main() -> None:
    for word in sys.argv[1:]:
        text, _, path = word.partition("=")
        record(text, path)
    scores, paths = score()
    print(markdown(scores))
    write_text(SCORES, scores.to_csv(index=False, lineterminator="\n"))
    draw(paths)
    page = HERE / "README.md"
    write_text(page, MARKS.sub(lambda m: f"{m[1]}{markdown(scores)}{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
