"""Name the columns of a table of runs, find what was varied, and choose the laws to compare."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from tinygpt.config import ConfigError
from tinygpt.config.checks import did_you_mean
from tinygpt.scaling.laws import LAWS, Array
from tinygpt.scaling.points import positive
from tinygpt.scaling.runs import RATES, SETTINGS

SAME = 1.1  # sizes or tokens within this factor were not varied
# Settings that determine a size or a length, which are variables of the law.
SHAPE = ("d_model", "n_layers", "n_heads", "d_ff", "config.model.n_kv_heads", "config.model.d_ff")
LENGTH = (
    "train_tokens",
    "data_fraction",
    *(f"config.train.{key}" for key in ("tokens", "steps", "epochs", "tokens_per_param", "flops")),
)
FINGERPRINTS = ("tokenizer_fingerprint", "data_fingerprint", "validation_fingerprint")
UNITS = {  # of losses, by name
    "bits_per_byte": "bits per byte",
    "bits_per_char": "bits per character",
    **dict.fromkeys(("final_val_loss", "best_val_loss", "test_loss"), "nats per token"),
}
WORDS = {
    "N": "parameters without embeddings",
    "D": "training tokens",
    "U": "unique tokens",
    "T": "context length (tokens)",
    "C": "training compute (FLOPs)",
}


@dataclass(frozen=True)
class Columns:
    """Name the columns that a law and its checks read; the defaults are those of results.json."""

    n: str = "parameters_non_embedding"
    n_total: str | None = "model_parameters"
    d: str = "train_tokens"
    u: str | None = "unique_train_tokens"
    t: str | None = "max_seq_len"
    c: str | None = "flops_exact"
    loss: str = "final_val_loss"
    seed: str | None = "seed"
    run: str | None = "folder"
    loss_unit: str | None = None  # shown beside the loss

    @property
    def loss_label(self) -> str:
        """Return the axis label of the loss."""
        unit = self.loss_unit or next((u for name, u in UNITS.items() if name in self.loss), "")
        return f"loss ({unit})" if unit else "loss"

    def where(self, runs: pd.DataFrame) -> dict[str, str]:
        """Return the columns that are in the table, by variable."""
        found = {"N": self.n, "D": self.d, "U": self.u, "T": self.t, "C": self.c}
        return {name: column for name, column in found.items() if column and column in runs}

    def compute(self, runs: pd.DataFrame) -> Array:
        """Return the FLOPs of each run, (n,): as recorded, else 6·N·D, else ones."""
        if self.c in runs:
            return positive(runs, str(self.c))
        if {self.n, self.d} <= set(runs):
            return 6.0 * positive(runs, self.n) * positive(runs, self.d)
        return np.ones(len(runs))

    def size(self, runs: pd.DataFrame, variables: Mapping[str, str]) -> tuple[Array, str]:
        """Return the size of each run, (n,), and its name: compute, or x if the law has one."""
        if "x" not in variables:
            return self.compute(runs), "compute"
        name = "compute" if variables["x"] == self.c else variables["x"]
        return positive(runs, variables["x"]), name

    def dependence(self, runs: pd.DataFrame, variables: Iterable[str]) -> list[pd.Series]:
        """Return labels that dependent rows share: place, run (of checkpoints), and trunk."""
        place = runs[list(variables)].apply(tuple, axis=1)
        keys = [place, *(runs[name] for name in [self.cluster(runs)] if name)]
        if {"branched_from", "run_name"} <= set(runs):
            keys.append(runs["branched_from"].astype(object).fillna(runs["run_name"]))
            keys.append(runs["run_name"])  # a branch may itself be a trunk
        return keys

    def trunks(self, runs: pd.DataFrame) -> NDArray[np.intp] | None:
        """Return a label of the size and seed of each run, (n,), or None if no trunk is shared."""
        shared = "branched_from" in runs and runs["branched_from"].notna().any()
        if not shared or self.n not in runs or self.seed not in runs:
            return None
        return np.asarray(runs.groupby([self.n, self.seed], dropna=False).ngroup(), dtype=np.intp)

    def floor(self, runs: pd.DataFrame) -> float | None:
        """Return the exact entropy of the corpus if it is known and all runs share it."""
        name = "irreducible_loss_exact"
        if self.loss != "final_val_loss" or name not in runs:
            return None
        values = runs[name].unique()
        return float(values[0]) if len(values) == 1 and pd.notna(values[0]) else None

    def validation_error(self, runs: pd.DataFrame) -> float | None:
        """Return the median relative standard error of the validation loss, if known."""
        names = ["final_val_loss_standard_error", "final_val_loss"]
        if not (self.loss.startswith("final_val") and set(names) <= set(runs)):
            return None
        error, loss = (pd.to_numeric(runs[name], errors="coerce") for name in names)
        part = float((error / loss).median())
        return part if part >= 0 else None

    def cluster(self, runs: pd.DataFrame) -> str | None:
        """Return the column of run names if rows are checkpoints that share them."""
        return self.run if self.run in runs and runs[self.run].duplicated().any() else None

    def name_of(self, runs: pd.DataFrame, row: int) -> str:
        """Return the name of the run at position ``row``, or the label of that row."""
        return str(runs[self.run].iloc[row]) if self.run in runs else f"row {runs.index[row]}"

    def as_results(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Return the table with the column names of ``results.json``, as the checks read it."""
        read = (*"nduct", "loss", "seed")
        known = {getattr(self, key): name for key, name in vars(Columns()).items() if key in read}
        names = {old: new for old, new in known.items() if old in runs and old != new}
        return runs.drop(columns=[n for n in names.values() if n in runs]).rename(columns=names)


def varied(runs: pd.DataFrame, where: dict[str, str]) -> list[str]:
    """Return the variables that differ between runs.

    U counts only if tokens repeat, C only if there is neither N nor D.
    """
    found = [v for v in "NDT" if where.get(v) in runs and _spread(runs[where[v]]) > SAME]
    if where.get("U") in runs:
        unique = runs[where["U"]]
        tokens = runs[where["D"]] if "D" in where else np.inf
        if (unique.nunique() > 1 or "D" in found) and (tokens > 1.001 * unique).any():
            found.append("U")
    if "T" in found and len(found) > 1 and "N" not in found:
        found.remove("T")
    if not found and not {"N", "D"} & set(where) and where.get("C") in runs:
        return ["C"] if _spread(runs[where["C"]]) > SAME else []
    return found


def other_settings(
    runs: pd.DataFrame, columns: Columns, variables: Iterable[str]
) -> dict[str, dict[str, list[str]]]:
    """Return settings that differ between runs outside the law, with their values, the most common
    first, and the names of their runs.

    Skips ``variables`` and what follows from them (model shape, a warm-up that goes with the
    tokens), the seed, and learning rates, of which ``comparable`` keeps the best.
    """
    scaled = [name for name in [*variables, columns.u] if name in runs]
    config = [name for name in map(str, runs) if name.startswith("config.")]
    passed = {*SHAPE, *LENGTH, *RATES, *scaled, columns.seed}
    found = {}
    for name in dict.fromkeys([*SETTINGS, columns.t, *FINGERPRINTS, *config]):
        if name in passed or name not in runs:
            continue
        # pandas turns integers in a column with gaps into floats
        values = runs[name].map(lambda v: f"{v:.12g}" if isinstance(v, float) else str(v))
        values = values.where(runs[name].notna(), "none")
        count = values.nunique()
        if count < 2 or count == len(runs):
            continue
        pairs = [pd.DataFrame({"one": values, "other": runs[other]}) for other in scaled]
        if any(len(two.drop_duplicates()) == count == two["other"].nunique() for two in pairs):
            continue
        found[str(name)] = {
            str(value): [columns.name_of(runs, int(row)) for row in np.flatnonzero(values == value)]
            for value in values.value_counts().index
        }
    return found


def _spread(values: pd.Series) -> float:
    return float(values.max() / values.min())


def choice(
    law: str, variable: str, varied: Sequence[str], where: dict[str, str]
) -> tuple[Sequence[str], dict[str, str], dict[str, str]]:
    """Return the laws to compare, and the columns and descriptions of their variables.

    Raises ConfigError for an unknown law or variable, or if nothing varies.
    """
    if variable != "auto":
        if variable not in where:
            raise ConfigError(f"variable={variable}: must be one of auto, {', '.join(where)}")
        varied = [variable]
    if law != "auto" and law not in LAWS:
        nearest = did_you_mean(law, list(LAWS))
        raise ConfigError(f"law={law}: must be one of auto, {', '.join(LAWS)}{nearest}")
    if not varied:
        raise ConfigError(
            "these runs have one size, one number of tokens and one context: there is no law to fit"
        )
    wanted = LAWS[law].variables if law != "auto" else ()
    if len(wanted) < 2 and (wanted or not {"N", "D"} <= set(varied)):
        laws = [name for name, one in LAWS.items() if len(one.variables) == 1]
        return laws, {"x": where[varied[0]]}, {"x": WORDS[varied[0]]}
    if variable != "auto":
        raise ConfigError(f"variable={variable}: law={law} goes by {' and '.join(wanted)}")
    names = ["N", "D", "U"] if "U" in (*wanted, *varied) else ["N", "D"]
    missing = [name for name in names if name not in where]
    if missing:
        raise ConfigError(f"law={law}: goes by {missing[0]}; name columns.{missing[0].lower()}=")
    laws = [n for n, one in LAWS.items() if {"N", "D"} <= set(one.variables) <= set(names)]
    return laws, {name: where[name] for name in names}, {name: WORDS[name] for name in names}


def read_places(text: str) -> list[dict[str, float]]:
    """Parse ``predict=``, as ``[{n: 13e9, d: 5e12}]`` or ``n=13e9,d=5e12``.

    Returns values by capital letter.  Raises ConfigError for anything else.
    """
    plain = text.strip() if text.strip()[:1] in ("[", "{") else f"{{{text}}}"
    try:
        found = yaml.safe_load(re.sub(r"([A-Za-z])\s*[:=]\s*", r"\1: ", plain))
    except yaml.YAMLError:
        found = None
    rows = found if isinstance(found, list) and found else [found]
    if not all(isinstance(row, dict) and row and None not in row.values() for row in rows):
        raise ConfigError(f"predict={text}: must be as [{{n: 13e9, d: 5e12}}]")
    places = [{str(name).upper(): value for name, value in row.items()} for row in rows]
    for place in places:
        for name, value in place.items():
            key = f"predict={text}: {name.lower()}"
            if name not in WORDS:
                raise ConfigError(f"{key}: must be one of n, d, u, t, c")
            place[name] = float(pd.to_numeric(str(value), errors="coerce"))
            if not 0 < place[name] < np.inf:
                raise ConfigError(f"{key}={value}: must be a number above zero")
    return places


def places_of(
    asked: Sequence[Mapping[str, float]], variables: Mapping[str, str], where: Mapping[str, str]
) -> tuple[list[dict[str, float]], str]:
    """Return places by variable of the law, and a note on the letters that it does not use.

    U defaults to D.  Raises ConfigError for a missing letter, or one that a law in N and D lacks.
    """
    x = next((v for v, column in where.items() if column == variables.get("x")), "")
    letters = {name: x if name == "x" else name for name in variables}
    wanted = list(letters.values())
    places, unused = [], dict[str, None]()
    for one in asked:
        given = {"U": one["D"], **one} if "U" in wanted and "D" in one else one
        missing = [f"{v.lower()} is missing" for v in wanted if v not in given]
        more = [v for v in given if v not in wanted]
        missing += [] if x else [f"{v.lower()} is not a variable" for v in more]
        if missing:
            goes_by = " and ".join(wanted).lower()
            raise ConfigError(f"predict: {missing[0]}: the law goes by {goes_by}")
        unused |= dict.fromkeys(more)
        places.append({name: float(given[v]) for name, v in letters.items()})
    listed = ", ".join(unused).lower()
    return places, f"The law does not use {listed} of `predict=`." if unused else ""


def question(words: dict[str, str]) -> str:
    *others, last = words.values()
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"How does the loss fall with {listed}?"
