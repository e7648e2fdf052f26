"""Describe what was measured, from the table and run folders, and print the command of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tinygpt import fileio
from tinygpt.config.counting import count_parameters
from tinygpt.config.schema import HORIZONS, ModelConfig, TrainConfig, variant
from tinygpt.scaling import wording
from tinygpt.scaling.analysis import Analysis
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.document import LINK, Block, Code, Folded, Heading, Paragraph, Table
from tinygpt.scaling.facts import shared_trunks
from tinygpt.scaling.intervals import LEVEL
from tinygpt.scaling.wording import count, letter, number, percent, whole

NAMES = {"learned": "learned positions", "rope": "RoPE", "rmsnorm": "RMSNorm"}
NAMES |= {"layernorm": "LayerNorm", "gelu": "GELU", "gelu_tanh": "GELU", "swiglu": "SwiGLU"}
GROUPS = ("data", "tokenizer", "optim", "schedule")
# Keys whose defaults in conf/ differ from those of the schema.
SET_BY_CHOICE = {"data.max_tokens", "data.separator", "optim.learning_rate", "optim.weight_decay"}


def measured(analysis: Analysis, table: str | None = None) -> Iterator[Block]:
    """Describe the runs for a reader who knows nothing else."""
    yield Heading("What was measured")
    yield Table(["", ""], [[name, value] for name, value in _facts(analysis, table) if value])
    if command := typed():
        yield Code(command)


def typed() -> str | None:
    """Return the tinygpt command that is running as it was typed, or None in other programs."""
    words = sys.orig_argv
    for at, word in enumerate(words):
        if word == "-m" and words[at + 1 : at + 2] and words[at + 1].split(".")[0] == "tinygpt":
            return shlex.join(["python", *words[at:]])
        if at == 1 and Path(word).name.startswith("tinygpt"):
            return shlex.join([Path(word).name, *words[2:]])
    return None


def _facts(analysis: Analysis, table: str | None) -> Iterator[tuple[str, str]]:
    """Yield names and values, which are empty if unknown."""
    runs, left = analysis.runs, len(analysis.left_out)
    config, machine = _folder_of(runs, runs.index[-1])
    yield "runs", f"{len(runs):,} fitted" + (f", {left:,} left out" if left else "")
    if table:
        size = f"{count(len(runs) + left, 'row')}, {count(runs.shape[1], 'column')}"
        yield "table", f"`{table}`, {size}"
    corpus = _values(runs, "dataset")
    if path := config.get("data", {}).get("path"):
        files = ", ".join(Path(one).name for one in path.strip("[]").split(","))
        corpus += "" if files == corpus else f" ({files})"
    if _unique(runs, "data_fraction") not in ([], [1.0]):
        corpus += f", fractions {_values(runs, 'data_fraction')}"
    yield "corpus", corpus
    for name, word in (("corpus", "training"), ("val", "validation"), ("test", "test")):
        sizes = (_spoken(runs, f"{name}_{of}", f"{{}} {of}") for of in ("tokens", "documents"))
        yield f"{word} text", " in ".join(filter(None, sizes))
    yield "tokenizer", _values(runs, "tokenizer") + _spoken(runs, "vocab_size", ", vocabulary {}")
    model = config.get("model", {})
    parts = ["GPT" if model else "", _values(runs, "n_layers", "{} layers")]
    parts.append(_values(runs, "max_seq_len", "context {}"))
    parts += [NAMES.get(str(model.get(key)), "") for key in ("position", "norm", "activation")]
    parts.append("µP" if model.get("parametrization") == "mup" else "")
    yield "model", ", ".join(filter(None, parts))
    where = analysis.columns.where(runs)
    if "N" in where:
        word = "parameters without embeddings" if where["N"] == Columns.n else "parameters"
        widths = _values(runs, "d_model", " (d_model {})")
        yield "sizes", f"{_range(runs, where['N'])} {word}{widths}"
    if "D" in where:
        yield "lengths", _range(runs, where["D"]) + " training tokens"
    yield "seeds", _values(runs, str(analysis.columns.seed))
    recipe = [_values(runs, "optimizer"), _values(runs, "learning_rate", "learning rate {}")]
    recipe += [_values(runs, "schedule"), _spoken(runs, "batch_tokens", "{} tokens a step")]
    yield "recipe", ", ".join(filter(None, recipe))
    if machine:
        threads = count(machine.get("threads") or 1, "thread")
        precision = _values(runs, "precision_resolved")
        device = f"{machine.get('device', '')}, {threads}, precision {precision}"
        yield "hardware", f"{device}; {machine.get('platform', '')}"
    yield "date", _dates(runs)
    version = machine.get("packages", {})
    words = [f"{name} {version[name]}" for name in ("tinygpt", "torch") if name in version]
    yield "version", ", ".join(filter(None, [*words, _values(runs, "git_commit", "commit {}", 7)]))


def _unique(runs: pd.DataFrame, name: str) -> list[Any]:
    return sorted(runs[name].dropna().unique()) if name in runs else []


def _values(runs: pd.DataFrame, name: str, words: str = "{}", length: int = 40) -> str:
    """Return the distinct values of a column, or their number and ends."""
    texts = [f"{v:g}" if isinstance(v, float) else str(v)[:length] for v in _unique(runs, name)]
    ends = f"{texts[0]} to {texts[-1]} ({len(texts)} values)" if len(texts) > 6 else ""
    return words.format(ends or ", ".join(texts)) if texts else ""


def _range(runs: pd.DataFrame, name: str) -> str:
    values = _unique(runs, name)
    if len(values) < 2:
        return whole(values[0])
    return f"{len(values)} from {whole(values[0])} to {whole(values[-1])}"


def _spoken(runs: pd.DataFrame, name: str, words: str) -> str:
    """Return ``1.24M tokens``, or both ends of a range."""
    values = [letter(float(f"{v:.3g}")) for v in _unique(runs, name)]
    ends = " to ".join(dict.fromkeys([*values[:1], *values[-1:]]))
    return words.format(ends) if ends else ""


def _folder_of(runs: pd.DataFrame, row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and environment of a run, or {} if its folder is gone."""
    folder = Path(str(runs["folder"][row])) if "folder" in runs else None
    if folder is None or not (folder / "config.yaml").exists():
        return {}, {}
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    place = folder / "environment.json"
    return config, fileio.read_json(place) if place.exists() else {}


def _dates(runs: pd.DataFrame) -> str:
    """Return the first and last day on which a run began, from the logs."""
    days = set()
    for folder in runs.get("folder", ()):
        log = Path(str(folder), "run.log")
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                days |= set(re.findall(r"^\d{4}-\d\d-\d\d", file.readline()))
    ends = sorted(days)
    return " to ".join(dict.fromkeys([*ends[:1], *ends[-1:]]))


# --- the runs themselves


def runs(analysis: Analysis, folder: Path | None = None) -> Iterator[Block]:
    """Return the ranges of the variables and the loss, and a folded list of all runs with links."""
    fit, compute = analysis.fit, analysis.compute
    yield Heading("Runs")
    points = len({tuple(row) for row in np.stack(list(fit.points.x.values()), 1).round(12)})
    at = f"{count(len(analysis.runs), 'run')} at {count(points, 'different point')}"
    yield Paragraph(f"{at}. What they span:")
    rows = [
        [f"{name}, {analysis.words[name]}", f"`{column}`", *wording.span(fit.table[column])]
        for name, column in analysis.variables.items()
    ]
    if compute.min() < compute.max():
        rows.append(["compute (FLOPs)", "", *wording.span(compute)])
    rows.append([analysis.columns.loss_label, f"`{fit.loss}`", *wording.span(fit.table[fit.loss])])
    yield Table(["", "column", "from", "to", "ratio", "values"], rows)
    if shared := shared_trunks(analysis.runs):
        saved = number(shared["independent_flops"] - shared["flops"])
        yield Paragraph(
            f"Training took {number(shared['flops'])} FLOPs: runs that share a trunk saved "
            f"{saved} ({percent(shared['saved'])}) against independent runs."
        )
    if len(analysis.left_out):
        yield Paragraph("`left_out.csv` lists the runs that were left out, and why.")
    yield Folded("Every run", [_every_run(analysis, folder)])


def _every_run(analysis: Analysis, folder: Path | None) -> Table:
    fit = analysis.fit
    fitted = fit.predict(**{v: fit.table[c].to_numpy() for v, c in analysis.variables.items()})
    rows = []
    for row, loss in enumerate(fit.table[fit.loss]):
        name = analysis.columns.name_of(analysis.runs, row)
        place = Path(name)
        if folder and "folder" in analysis.runs and (place / "results.json").exists():
            path = Path(os.path.relpath(place, folder)).as_posix().replace(" ", "%20")
            name = f"[{place.name}]({path})" if LINK.fullmatch(f"[{place.name}]({path})") else name
        places = [whole(fit.table[column].iloc[row]) for column in analysis.variables.values()]
        rows.append([name, *places, number(loss, 5), f"{100 * (loss / fitted[row] - 1):+.2f} %"])
    return Table(["run", *analysis.words.values(), "loss", "measured / law − 1"], rows)


# --- the command of a run


def next_run(analysis: Analysis) -> Iterator[Block]:
    """Describe the run that would narrow the prediction most."""
    one = analysis.next_run
    if one is None or not np.isfinite(one.width_now):
        return
    yield Heading("What to run next")
    if one.width_then > 0.97 * one.width_now:
        yield Paragraph("No single run would narrow the prediction by much.")
        return
    place = ", ".join(f"{number(of)} {analysis.words[name]}" for name, of in one.place.items())
    cost = f" ({number(one.cost)} FLOPs)" if analysis.compute.max() > 1 else ""
    yield Paragraph(
        f"A run with {place}{cost} would narrow the prediction most: its {100 * LEVEL:.0f} % "
        f"interval is now {percent(one.width_now)} of the loss wide, and would be "
        f"{percent(one.width_then)}."
    )
    if command := next_command(analysis):
        yield Paragraph("The nearest model size, with the settings of the closest run:")
        yield Code(command)


def next_command(analysis: Analysis) -> str | None:
    """Return the command of the next run, with the settings of the closest run, or None if its
    folder is gone."""
    one, columns = analysis.next_run, analysis.columns
    if one is None or "folder" not in analysis.runs:
        return None
    wanted = {analysis.variables[name]: value for name, value in one.place.items() if name != "U"}
    if not wanted or not wanted.keys() <= {columns.n, columns.d, columns.t}:
        return None
    runs = analysis.runs
    away = np.log(runs[list(wanted)].astype(float) / list(wanted.values())) ** 2
    config, _ = _folder_of(runs, away.sum(axis=1).idxmin())
    if not {"model", "train", *GROUPS} <= config.keys():
        return None
    if columns.n in wanted:
        config["model"] |= _shape(runs, config["model"], wanted[columns.n])
    if columns.d in wanted:
        steps = max(1, round(wanted[columns.d] / config["train"]["batch_tokens"]))
        config["train"] |= dict.fromkeys(HORIZONS)
        config["train"]["tokens"] = steps * config["train"]["batch_tokens"]
    if columns.t in wanted:
        config["model"]["max_seq_len"] = max(1, round(wanted[str(columns.t)]))
    config["seed"] = int(runs["seed"].max()) + 1
    return command_of(config)


def _shape(runs: pd.DataFrame, model: Mapping[str, Any], parameters: float) -> dict[str, int]:
    """Return the width and heads, or the layers, of the model closest to that size."""
    if runs["d_model"].nunique() == 1 and runs["n_layers"].nunique() > 1:
        shapes = [{"n_layers": layers} for layers in range(1, 1000)]
    else:
        heads, vary = model["n_heads"], runs["n_heads"].nunique() > 1
        step = model["d_model"] // heads if vary else heads
        shapes = [{"d_model": step * k, "n_heads": k if vary else heads} for k in range(1, 1000)]
    known = {name: value for name, value in model.items() if name in ModelConfig.__annotations__}
    sizes = [count_parameters(ModelConfig(**known | one), 1).non_embedding for one in shapes]
    return shapes[int(np.argmin(np.abs(np.log(np.array(sizes) / parameters))))]


def command_of(config: Mapping[str, Any]) -> str:
    """Return the command that trains the run of a ``config.yaml``."""
    words = [f"{group}={config[group].get('kind') or config[group]['source']}" for group in GROUPS]
    classes = {group: variant(group, config[group]) for group in GROUPS}
    for group, known in {"model": ModelConfig, "train": TrainConfig, **classes}.items():
        words += _differing(group, config[group], dataclasses.asdict(known()))
    top = {"study": None, "output_dir": "outputs", "init_from": None, "seed": None}
    words += [f"{k}={_written(config.get(k))}" for k, v in top.items() if config.get(k) != v]
    return shlex.join(["python", "-m", "tinygpt.run", *words])


def _differing(group: str, values: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a group that differ from the defaults of the schema."""
    for name in (name for name in usual if name in values and name not in ("kind", "source")):
        key, value = f"{group}.{name}", values[name]
        if isinstance(usual[name], dict):
            yield from _differing(key, value, usual[name])
        elif (value != usual[name] or key in SET_BY_CHOICE) and value != values.get("source"):
            yield f"{key}={_written(value)}"


def _written(value: Any) -> str:
    """Return a value in the syntax of Hydra."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_written(one)}" for name, one in value.items()) + "}"
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z_./~-][\w./~-]*", value):
        return str(value)
    plain = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    return "'" + plain.replace("'", "\\'") + "'"
