"""evaluation_results.csv and .json, and runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt import fileio, rundir
from tinygpt.evaluating.folders import find, names_of
from tinygpt.scaling.runs import SETTINGS, load_runs

if TYPE_CHECKING:
    import pandas as pd

    from tinygpt.evaluating.runs import Evaluation

OUTCOMES = (
    "status",
    "final_val_loss",
    "final_val_bits_per_byte",
    "final_val_accuracy",
    "test_loss",
)

DEFINITIONS = {
    "loss": "nats per token, every target of the text once",
    "accuracy": "share of targets that are the likeliest token; _top5: less than five are likelier",
    "bits_per_byte": "of the text, ends of documents included in the bits",
    "gain": "ln(vocabulary) - loss: nats per token below a uniform guess",
    "gain_per_pflop": "gain / (exact training FLOPs up to the checkpoint / 1e15)",
    "gain_per_million_parameters": "gain / (all parameters / 1e6)",
    "gain_per_hour": "gain / hours of training up to the checkpoint, on the run's own machine",
    "tokens_to_1_percent": "training tokens at the run's first evaluation whose validation loss is "
    "within 1 % of its last one",
    "by_position": "mean loss at each position of windows of full length, one behind the other",
    "int8": "weights of all linear layers rounded to int8, a scale a row; nothing else",
    "pruned": "that share of the weights of all linear layers zero, the smallest of all together",
    "size_bytes": "all parameters, tied ones once; int8: with the scales; pruned: a bit for each "
    "weight of a linear layer, then those that are not zero",
}


def compare(*runs: str | Path) -> pd.DataFrame:
    """Trained runs side by side, from what they recorded: nothing is computed anew.

    A row a run: size, budget, losses, then every key of the configuration in which they differ.
    ``runs`` are run folders or folders of runs.  Raises ConfigError.
    """
    import pandas as pd

    table = load_runs(*runs)
    if table.empty:
        find(runs)  # says why
    names = names_of([Path(folder) for folder in table["folder"]])
    known = [name for name in (*rundir.SIZES, *OUTCOMES) if name in table]
    settings = ["seed", *(name for name in SETTINGS if name not in rundir.SIZES)]
    settings += [str(name) for name in table if str(name).startswith("config.")]
    differing = [name for name in settings if name in table and table[name].map(repr).nunique() > 1]
    shown = table[[*known, *differing]].set_axis(pd.Index(names, name="run"))
    return shown.rename(columns=lambda name: str(name).removeprefix("config."))


def write(
    made: Sequence[Evaluation],
    folder: Path,
    arguments: dict[str, Any],
    refused: Sequence[str],
) -> list[Path]:
    """Both files; what is not finite is an empty field and null.  ``refused``: a line for each run
    that is not among them."""
    columns = list(dict.fromkeys(name for one in made for name in one.row))
    rows = ({name: _finite(value) for name, value in one.row.items()} for one in made)
    found = [folder / "evaluation_results.csv", folder / "evaluation_results.json"]
    fileio.write_csv(found[0], rows, columns)
    fileio.write_json(
        found[1],
        {
            "definitions": DEFINITIONS,
            "arguments": arguments,
            "environment": rundir.environment(),
            "results": [_as_json(one, columns) for one in made],
            "not_scored": list(refused),
        },
    )
    return found


def _as_json(one: Evaluation, columns: Sequence[str]) -> dict[str, Any]:
    row = {name: _finite(one.row.get(name)) for name in columns}
    if one.positions is None:
        return {**row, "by_position": None}
    loss, error = one.positions.loss.tolist(), one.positions.error.tolist()
    by_position = {
        "windows": one.positions.windows,
        "loss": [_finite(value) for value in loss],
        "standard_error": [_finite(value) for value in error],
    }
    return {**row, "by_position": by_position}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
