"""Convert the columns of a table to parameters, tokens, FLOPs and nats."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from tinygpt.config import ConfigError
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.runs import words_of

Units = Mapping[str, float]  # parameters, tokens or FLOPs per unit of n, d and c
SCALES = {  # names of units, and the last word of a column's name
    1e3: ("thousands", "k|thousands?"),
    1e6: ("millions", "mm?|millions?"),
    1e9: ("billions", "bn?|g|billions?"),
    1e12: ("trillions", "tn?|trillions?"),
}
FLOPS = {  # the same for compute, where the unit may be the whole name
    8.64e19: ("PFLOP-days", "p(eta)?_?f(lops?)?_?s?_?days?"),
    8.64e16: ("TFLOP-days", "t(era)?_?f(lops?)?_?s?_?days?"),
    1e21: ("1e+21 FLOPs", "z(etta)?_?flops?"),
    1e18: ("1e+18 FLOPs", "e(xa)?_?flops?"),
    1e15: ("1e+15 FLOPs", "p(eta)?_?flops?"),
    1e12: ("1e+12 FLOPs", "t(era)?_?flops?"),
    1e9: ("1e+09 FLOPs", "g(iga)?_?flops?"),
}
COUNTS = {"n": (1e3, 1e14), "d": (1e3, 1e16), "c": (1e6, 1e32)}  # plausible medians
EPOCHS = 1e5  # most times that a token is read
FEW, MANY = 1e3, 1e6  # counts that do not go together in one column
LARGEST = 20.0  # nats per token: a guess among 5e8 tokens


def in_units(
    table: pd.DataFrame, used: pd.DataFrame, columns: Columns, named: Mapping[str, str],
    stated: Units, notes: list[str], cells: pd.DataFrame,
) -> tuple[pd.DataFrame, Columns]:  # fmt: skip
    """Return the table with sizes in parameters, tokens and FLOPs.

    ``named`` gives columns by letter and ``stated`` their units; ``cells`` is the table as
    written, where a value may have its own unit (1.2B).  Raises ConfigError for unclear units.
    """
    keys = [key for key in "ndcu" if key in named]
    texts = {key: cells[named[key]].astype(str) for key in keys}
    bare = {key: ~text.str.contains(r"[A-DF-WYZa-df-wyz]") for key, text in texts.items()}
    own = [key for key in keys if 2 * bare[key][used.index].sum() < len(used)]
    known = {**dict.fromkeys(own, 1.0), **stated}
    values = {key: used[named[key]].astype(float) for key in keys}
    values = {k: v if k in own else v[bare[k][v.index]] for k, v in values.items()}
    unique = values.pop("u", None)
    units = _choose(values, named, {k: known[k] for k in values if k in known}, notes)
    for key in keys:
        if key == "u" and unique is not None:
            known = {"d": units.get("d", 1.0), **known}
            tokens = table.get(columns.d)
            units["u"] = _unit_of_unique(unique, named["u"], tokens, known, notes)
        if (unit := units[key]) != 1:
            column = f"{named[key]} × {unit:g}"
            table = table.assign(**{column: table[named[key]] * unit ** bare[key].astype(int)})
            columns = dataclasses.replace(columns, **{key: column})
    for key in (key for key in "nd" if key in units):
        counts = table.loc[used.index, getattr(columns, key)]
        if key not in stated and counts.min() < FEW < MANY < counts.median():
            raise ConfigError(
                f"{named[key]}={counts.min():g}: row {counts.idxmin()}: beside a median of "
                f"{counts.median():.3g} its unit seems to be missing; where= leaves rows out, and "
                f"units.{key}={units[key]:g} says that it is right"
            )
    if columns.d not in table and {columns.n, columns.c} <= set(table):
        column = f"{columns.c} / (6 {columns.n})"
        notes.append(f"tokens: D = {column}, by C = 6 N D")
        table = table.assign(**{column: (table[columns.c] / (6 * table[columns.n])).round()})
        columns = dataclasses.replace(columns, d=column)
    return table, columns


def _choose(
    values: Mapping[str, pd.Series], columns: Mapping[str, str], stated: Units, notes: list[str]
) -> dict[str, float]:
    """Return the units of N, D and C: as stated, else by name, else by C = 6 N D.

    Raises ConfigError if that gives no plausible counts, or contradicts the names.
    """
    named = {key: columns[key] for key in values}
    plain = {key: stated.get(key, 1.0) for key in named}
    notes += [f"units: {named[k]} is in {u:g}, as given" for k, u in plain.items() if u != 1]
    units = {k: stated.get(k) or _unit_in(k, column) for k, column in named.items()}
    why = "by their names"
    if named and not _are_plausible(values, units, stated):
        is_named = units != plain and _are_plausible(values, plain, stated)
        chosen = [] if is_named else _by_compute(values, plain, stated)
        if len(chosen) != 1:
            raise ConfigError(_question(values, named))
        units, why = chosen[0], "for then C is about 6 N D"
    listed = [f"{named[k]} is in {_word(k, u)}" for k, u in units.items() if u != plain[k]]
    if listed:
        notes.append(f"units: {', '.join(listed)}, {why}")
    ratio = _over_6nd(values, units) if len(named) == 3 else 1.0
    if not 1 / 3 <= ratio <= 3:
        notes.append(f"compute: {named['c']} is {ratio:.2g} times 6 N D (the median)")
    return units


def _unit_of_unique(
    unique: pd.Series, column: str, tokens: pd.Series | None, known: Units, notes: list[str]
) -> float:
    """Return the unit of the unique tokens: as stated, else by name, else that of all tokens or 1.

    Raises ConfigError if that makes them more than all tokens, or almost none.
    """
    by_name = _unit_in("u", column)
    for unit in [known["u"]] if "u" in known else [by_name] if by_name != 1 else [known["d"], 1.0]:
        part = 1.0 if tokens is None else float((unique * unit / tokens).median())
        if "u" in known or 1 / EPOCHS <= part <= 1:
            if unit != 1 or known["d"] != 1:
                notes.append(f"units: {column} is in {_word('u', unit) if unit != 1 else 'tokens'}")
            return unit
    raise ConfigError(
        f"columns.u={column}: its median is {unique.median():.3g}, {part:.2g} of all tokens; it "
        f"must be at most all and at least {1 / EPOCHS:g}; units.u= says what it counts in, as 1e9"
    )


def _are_plausible(
    values: Mapping[str, pd.Series], units: Units, stated: Units, factor: float = 30.0
) -> bool:
    """Return whether the counts are plausible, with C within ``factor`` of 6 N D."""
    counts = {key: value * units[key] for key, value in values.items()}
    for key, (least, most) in COUNTS.items():
        if key in counts and key not in stated and not least <= counts[key].median() <= most:
            return False
    if "d" not in counts and {"n", "c"} <= set(counts):
        counts["d"] = counts["c"] / (6 * counts["n"])
    is_stated = {"n", "d"} <= set(stated) or not {"n", "d"} <= set(counts)
    if not is_stated and not 0.1 <= float((counts["d"] / counts["n"]).median()) <= 1e4:
        return False
    return len(values) < 3 or "c" in stated or 1 / factor <= _over_6nd(values, units) <= factor


def _over_6nd(values: Mapping[str, pd.Series], units: Units) -> float:
    n, d, c = (values[key] * units[key] for key in "ndc")
    return float((c / (6 * n * d)).median())


def _by_compute(
    values: Mapping[str, pd.Series], plain: Units, stated: Units
) -> list[dict[str, float]]:
    """Return the units with the fewest changes that bring C within a factor 3 of 6 N D."""
    if len(values) < 3:
        return []
    sizes = {key: values[key] for key in "nd"}
    scales = [1.0] if _are_plausible(sizes, plain, stated) else [1.0, *SCALES]
    choices = {"n": [unit for unit in scales if unit < 1e12], "d": scales, "c": [1.0, *FLOPS]}
    choices |= {key: [unit] for key, unit in stated.items()}
    every = [dict(zip("ndc", one, strict=True)) for one in itertools.product(*choices.values())]
    found = [units for units in every if _are_plausible(values, units, stated, 3.0)]
    kept = [list(units.values()).count(1.0) for units in found]
    return [units for units, count in zip(found, kept, strict=True) if count == max(kept)]


def _unit_in(key: str, column: str) -> float:
    """Return the unit in a column's name, as params_m, tokens (B) or pf-days; else 1."""
    known, before = SCALES, ""
    if key == "c":
        known, before, column = FLOPS, "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column)
    name = before + "_".join(re.findall("[a-z]+", column.casefold()))
    return next((unit for unit, (_, end) in known.items() if re.search(f"_({end})$", name)), 1.0)


def _word(key: str, unit: float) -> str:
    known = FLOPS if key == "c" else SCALES
    return known[unit][0] if unit in known else f"{unit:g}{' FLOPs' if key == 'c' else ''}"


def _question(values: Mapping[str, pd.Series], named: Mapping[str, str]) -> str:
    """Return an error line with the implausible medians and the keys that settle them."""
    plain = dict.fromkeys(named, 1.0)
    found = ", ".join(f"{named[key]} {v.median():.3g}" for key, v in values.items())
    if {"n", "d"} <= set(named):
        found += f", so D/N is {(values['d'] / values['n']).median():.2g}"
    if len(named) == 3:
        found += f" and C / 6ND {_over_6nd(values, plain):.2g}"
    kinds = {"n": ("parameters", "1e6"), "d": ("tokens", "1e9"), "c": ("FLOPs", "8.64e19")}
    return (
        f"columns.{next(iter(named))}={next(iter(named.values()))}: the medians are {found}; if "
        f"these are not plain counts of {', '.join(kinds[key][0] for key in named)}, say in what "
        f"they are, as {' '.join(f'units.{key}={kinds[key][1]}' for key in named)}; "
        f"if they are, {' '.join(f'units.{key}=1' for key in named)}"
    )


def in_nats(
    table: pd.DataFrame, used: pd.DataFrame, columns: Columns, unit: str | None, notes: list[str]
) -> tuple[pd.DataFrame, Columns]:
    """Return the table with perplexities, or their logarithms to base 2 or 10, turned into nats.

    ``unit`` is the unit that was given.  Raises ConfigError for a name that says both loss and
    perplexity, and for impossible values.
    """
    loss, name = columns.loss, re.sub(r"[\W_]+", "_", columns.loss.casefold())
    is_named = unit is None and re.search(r"(?:^|_|ln|log|\d)(?:ppl|perplexity)(?:_|$)", name)
    base = is_named and re.search(r"(?<![a-z])(?:ln|log_?(10|2)?)(?=_|$|ppl|perp)", name)
    if is_named and {"loss", "nll"} & set(words_of(loss)):
        raise ConfigError(
            f"columns.loss={loss}: a loss and a perplexity by its name; loss_unit=perplexity takes "
            "the logarithm, loss_unit=nats says that it is a loss"
        )
    if unit == "perplexity" or (is_named and not base):
        for row, value in used[loss][used[loss] <= 1].items():
            raise ConfigError(f"{loss}={value:g}: row {row}: no perplexity is below 1")
        notes.append(f"loss: {loss} is a perplexity; its logarithm is fitted")
        column = f"log({loss})"
        table = table.assign(**{column: np.log(table[loss].where(table[loss] > 0))})
        return table, dataclasses.replace(columns, loss=column)
    large = used[loss][used[loss] > LARGEST]
    if unit is None and len(large):
        raise ConfigError(
            f"{loss}={large.iloc[0]:g}: row {large.index[0]}: too large for a loss per token; "
            "loss_unit=perplexity takes the logarithm of perplexities, where= leaves rows out, and "
            "loss_unit= with the unit in words says that it is right"
        )
    if base:
        kind = f"the logarithm of a perplexity, to base {base[1] or 'e'}"
        notes.append(f"loss: {loss} is {kind}; it is fitted in nats")
    if base and base[1]:
        column = f"{loss} × ln {base[1]}"
        table = table.assign(**{column: table[loss] * np.log(float(base[1]))})
        return table, dataclasses.replace(columns, loss=column)
    return table, dataclasses.replace(columns, loss_unit=unit or columns.loss_unit)
