"""What a table of runs says where, what was varied in it, and which laws can tell of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tinygpt.checks import did_you_mean
from tinygpt.config import ConfigError
from tinygpt.scaling.isoflop import SAME_BUDGET
from tinygpt.scaling.laws import LAWS, Array
from tinygpt.scaling.points import positive
from tinygpt.scaling.runs import RATES, SETTINGS

SAME = 1.1  # sizes or tokens that differ by less than this factor were not varied
# What makes a size, what makes a length: the law has them in its variables.
SHAPE = ("d_model", "n_layers", "n_heads", "d_ff", "config.model.n_kv_heads", "config.model.d_ff")
LENGTH = (
    "train_tokens",
    "data_fraction",
    *(f"config.train.{key}" for key in ("tokens", "steps", "epochs", "tokens_per_param", "flops")),
)
FINGERPRINTS = ("tokenizer_fingerprint", "data_fingerprint", "validation_fingerprint")
UNITS = {  # of a loss by its name: those of results.json, and bits
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
    """Where a table says what; the defaults are those of ``results.json``."""

    n: str = "parameters_non_embedding"
    n_total: str | None = "model_parameters"
    d: str = "train_tokens"
    u: str | None = "unique_train_tokens"
    t: str | None = "max_seq_len"
    c: str | None = "flops_exact"
    loss: str = "final_val_loss"
    seed: str | None = "seed"
    run: str | None = "folder"
    loss_unit: str | None = None  # said beside the loss; of our own and of bits it is known

    @property
    def loss_label(self) -> str:
        """What an axis of the loss says."""
        unit = self.loss_unit or next((u for words, u in UNITS.items() if words in self.loss), "")
        return f"loss ({unit})" if unit else "loss"

    def where(self, runs: pd.DataFrame) -> dict[str, str]:
        """Variable -> column, of those that the table has."""
        found = {"N": self.n, "D": self.d, "U": self.u, "T": self.t, "C": self.c}
        return {name: column for name, column in found.items() if column and column in runs}

    def compute(self, runs: pd.DataFrame) -> Array:
        """FLOPs of each run, (n,): as recorded, else 6·N·D; ones where there is neither."""
        where = self.where(runs)
        if "C" in where:
            return positive(runs, where["C"])
        if {"N", "D"} <= set(where):
            return 6.0 * positive(runs, where["N"]) * positive(runs, where["D"])
        return np.ones(len(runs))

    def size(self, runs: pd.DataFrame, variables: Mapping[str, str]) -> tuple[Array, str]:
        """What says which runs are the larger ones, (n,), and its name: the compute, or the x of
        a law in one variable where the table does not have it or all runs share one budget."""
        compute, x = self.compute(runs), variables.get("x")
        if x is None or compute.max() > SAME_BUDGET * compute.min():
            return compute, "compute"
        return positive(runs, x), x

    def floor(self, runs: pd.DataFrame) -> float | None:
        """The entropy of the corpus, where it is known exactly and is that of all runs."""
        name = "irreducible_loss_exact"
        if self.loss != "final_val_loss" or name not in runs or runs[name].isna().any():
            return None
        return float(runs[name].iloc[0]) if runs[name].nunique() == 1 else None

    def cluster(self, runs: pd.DataFrame) -> str | None:
        """The column of the run's name where several rows, its checkpoints, share one."""
        return self.run if self.run in runs and runs[self.run].duplicated().any() else None

    def name_of(self, runs: pd.DataFrame, row: int) -> str:
        """The name of a run, by its place in the table; its row where it has none."""
        if self.run and self.run in runs:
            return str(runs[self.run].iloc[row])
        return f"row {runs.index[row]}"

    def as_results(self, runs: pd.DataFrame) -> pd.DataFrame:
        """The table with the names of ``results.json``, which the checks of the design read."""
        known = {
            "parameters_non_embedding": self.n,
            "train_tokens": self.d,
            "unique_train_tokens": self.u,
            "max_seq_len": self.t,
            "flops_exact": self.c,
            "final_val_loss": self.loss,
            "seed": self.seed,
        }
        names = {old: new for new, old in known.items() if old and old in runs and old != new}
        return runs.drop(columns=[n for n in names.values() if n in runs]).rename(columns=names)


def varied(runs: pd.DataFrame, where: dict[str, str]) -> list[str]:
    """N, D and T if they take several values; U where it is not simply all of D."""
    found = [v for v in "NDT" if where.get(v) in runs and _spread(runs[where[v]]) > SAME]
    if where.get("U") in runs:
        unique = runs[where["U"]]
        tokens = runs[where["D"]] if "D" in where else np.inf
        repeated = (tokens > 1.001 * unique).any()
        if unique.nunique() > 1 and repeated:
            found.append("U")
    if "T" in found and len(found) > 1 and "N" not in found:
        found.remove("T")
    if not {"N", "D"} & set(where) and where.get("C") in runs and not found:
        found += ["C"] if _spread(runs[where["C"]]) > SAME else []
    return found


def other_settings(
    runs: pd.DataFrame, columns: Columns, variables: Iterable[str]
) -> dict[str, dict[str, list[str]]]:
    """Settings that differ though no law here has them: setting -> value -> names of its runs.

    The commonest value comes first.  Not named are ``variables``, what goes with one of them
    value for value (the warm-up with the tokens), the shape that makes a size, the seed, and the
    rates, of which ``comparable`` keeps the best of each setting.
    """
    scaled = [name for name in [*variables, columns.u] if name in runs]
    known = [name for name in (*SETTINGS, columns.t, *FINGERPRINTS) if name and name in runs]
    known += [name for name in map(str, runs) if name.startswith("config.")]
    passed = {*SHAPE, *LENGTH, *RATES, *scaled, columns.seed}
    found = {}
    for name in dict.fromkeys(known):
        values = runs[name].map(_as_typed).where(runs[name].notna(), "none")
        if name in passed or values.nunique() < 2 or len(runs) == values.nunique():
            continue
        if any(_same_split(values, runs[other]) for other in scaled):
            continue
        found[name] = {
            str(value): [columns.name_of(runs, int(row)) for row in np.flatnonzero(values == value)]
            for value in values.value_counts().index
        }
    return found


def _as_typed(value: Any) -> str:
    """A whole number in a column with gaps is a float to pandas."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _same_split(one: pd.Series, other: pd.Series) -> bool:
    """Whether two columns divide the runs in the same way."""
    pairs = pd.DataFrame({"one": one, "other": other}).drop_duplicates()
    return len(pairs) == one.nunique() == other.nunique()


def _spread(values: pd.Series) -> float:
    return float(values.max() / values.min())


def choice(
    law: str, variable: str, varied: Sequence[str], where: dict[str, str]
) -> tuple[Sequence[str], dict[str, str], dict[str, str]]:
    """The laws to compare, their variables' columns, and how to call them.

    Raises ConfigError for a law or a variable that there is not, and where nothing varies.
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
    """Return what ``predict=`` asks for, as ``[{n: 13e9, d: 5e12}]`` or ``n=13e9,d=5e12``: by
    letter, in capitals.  Raises ConfigError."""
    allowed = "must be as [{n: 13e9, d: 5e12}]"
    plain = text.strip() if text.strip()[:1] in ("[", "{") else f"{{{text}}}"
    try:
        found = yaml.safe_load(re.sub(r"([A-Za-z])\s*[:=]\s*", r"\1: ", plain))
    except yaml.YAMLError as error:
        raise ConfigError(f"predict={text}: {allowed}") from error
    rows = [found] if isinstance(found, dict) else found
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and row and None not in row.values() for row in rows)
    ):
        raise ConfigError(f"predict={text}: {allowed}")
    places = []
    for row in rows:
        place = {}
        for name, value in row.items():
            if str(name).upper() not in WORDS:
                raise ConfigError(f"predict={text}: {name}: must be one of n, d, u, t, c")
            try:
                place[str(name).upper()] = number = float(str(value))
            except ValueError:
                number = float("nan")
            if not 0 < number < float("inf"):
                raise ConfigError(f"predict={text}: {name}={value}: must be a number above zero")
        places.append(place)
    return places


def places_of(
    asked: Sequence[Mapping[str, float]], variables: Mapping[str, str], where: Mapping[str, str]
) -> tuple[list[dict[str, float]], str]:
    """Return places by the variables of the law, and a note on the letters it has no use for.

    Unique tokens that are not given are all of D.  Raises ConfigError for what is missing, and
    for a letter that a law in N and D does not have.
    """
    letter = next((v for v, column in where.items() if column == variables.get("x")), "")
    letters = {name: letter if name == "x" else name for name in variables}
    goes_by = " and ".join(one.lower() for one in letters.values())
    places, unused = [], dict[str, None]()
    for one in asked:
        given = {"U": one["D"], **one} if "U" in letters.values() and "D" in one else dict(one)
        missing = [v for v in letters.values() if v not in given]
        more = [v for v in given if v not in letters.values()]
        if missing or (more and not letter):
            wrong = f"{missing[0].lower()} is missing" if missing else f"{more[0].lower()} is none"
            raise ConfigError(f"predict: {wrong}: the law goes by {goes_by}")
        unused |= dict.fromkeys(more)
        places.append({name: float(given[v]) for name, v in letters.items()})
    listed = ", ".join(unused).lower()
    return places, f"Of what `predict=` gave, the law has no use for {listed}." if unused else ""


def question(words: dict[str, str]) -> str:
    *others, last = words.values()
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"How does the loss fall with {listed}?"
