"""``python -m tinygpt.fit``: runs to scaling laws, figures and a report."""

from __future__ import annotations

import dataclasses
import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from tinygpt import checks, cli, rundir
from tinygpt.config import ConfigError, key

if TYPE_CHECKING:
    import pandas as pd

    from tinygpt.scaling.columns import Columns

USAGE = """\
python -m tinygpt.fit runs=outputs/width [key=value ...]

runs=FOLDER[,FOLDER]    runs, studies or outputs/ as a whole; of adaptation (adapt.jsonl) with
                        seed= and output_dir= alone
table=FILE              instead: a .csv or .parquet with a row a run; its columns are named by
                        columns.n= d= u= t= c= loss= seed= run=
                        (parameters, tokens, unique tokens, context, FLOPs, loss, seed, name)
where=CONDITION         only these runs, as 'params > 1e6' or 'outlier == 0'; the others are listed
law=auto                the best by AICc, or the name of one: power power_constant log_power broken
                        chinchilla chinchilla_tied chinchilla_zero kaplan kaplan_constant coupled
                        data_constrained
                        or FILE.py:NAME, one of your own (docs/laws.md)
variable=auto           what a law in one variable goes by: N D U T C
loss=final_val_loss     the column of the loss; final_val_bits_per_byte compares tokenizers
estimator=auto          least_squares huber absolute likelihood
threshold=NUMBER        of huber, in units of the noise; threshold_unit=absolute: in log L
objective=log           raw: residuals of the loss itself, not of its logarithm
budgets=1e15,1e16       FLOPs to split between parameters and tokens
predict=PLACES          the loss, with its interval, at '[{n: 13e9, d: 5e12}, {n: 7e9, d: 2e12}]';
                        a law in one variable takes n, d, u, t or c alone
isoflop=cubic           the curve through the runs of a budget: cubic akima parabola
seed=0                  of the bootstrap and of random starts
output_dir=FOLDER       where to put a folder fit-<name>; default: fit/ in the first folder of runs,
                        outputs/fit-<name> for a table
"""


@dataclass
class TableColumns:
    """Where a table from elsewhere says what."""

    n: Optional[str] = None
    d: Optional[str] = None
    u: Optional[str] = None
    t: Optional[str] = None
    c: Optional[str] = None
    loss: Optional[str] = None
    seed: Optional[str] = None
    run: Optional[str] = None


@dataclass
class Arguments:
    runs: list[str] = field(default_factory=list)
    table: Optional[str] = None
    columns: TableColumns = field(default_factory=TableColumns)
    where: Optional[str] = None
    law: str = "auto"
    variable: str = "auto"
    loss: str = "final_val_loss"
    estimator: str = "auto"
    threshold: Optional[float] = key(None, above=0.0)
    threshold_unit: str = key("noise", among=("noise", "absolute"))
    objective: str = key("log", among=("log", "raw"))
    budgets: list[float] = field(default_factory=list)
    predict: Optional[str] = None
    isoflop: str = key("cubic", among=("cubic", "akima", "parabola"))
    seed: int = key(0, least=0)
    output_dir: Optional[str] = None


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    if bool(arguments.runs) == bool(arguments.table):
        raise ConfigError("runs: give runs=FOLDER, or table=FILE")
    if _are_adaptations(arguments):
        from tinygpt.scaling import adaptation_report

        adaptation_report.make(arguments.runs, _folder(arguments), arguments.seed)
        return
    from tinygpt.scaling import own_laws
    from tinygpt.scaling.columns import read_places

    places = [] if arguments.predict is None else read_places(arguments.predict)
    law = own_laws.load(arguments.law) if ".py:" in arguments.law else arguments.law
    table, columns, folder = _read(arguments)
    from tinygpt.scaling import report  # scipy and matplotlib: once there is something to fit
    from tinygpt.scaling.analysis import analyse
    from tinygpt.scaling.runs import comparable, curves_of

    used, left_out = comparable(table, columns.loss, arguments.where)
    analysis = analyse(
        used,
        left_out,
        columns,
        law=law,
        variable=arguments.variable,
        estimator=arguments.estimator,
        threshold=arguments.threshold,
        threshold_unit=arguments.threshold_unit,
        objective=arguments.objective,
        budgets=arguments.budgets,
        places=places,
        isoflop=arguments.isoflop,
        seed=arguments.seed,
        curves=curves_of(table) if arguments.runs else None,
        condition=arguments.where,
    )
    report.write(analysis, folder)
    report.show(analysis, folder)


def _are_adaptations(arguments: Arguments) -> bool:
    """Whether the runs adapted a base.  Of a folder that holds both, the trainings are meant.

    Raises ConfigError where folders of the two kinds are named.
    """
    for name in arguments.runs:
        if not Path(name).is_dir():
            raise ConfigError(f"runs={name}: no such folder")
    folders = [Path(name) for name in arguments.runs]
    adapted = {folder: sorted(folder.rglob("adapt.jsonl")) for folder in folders}
    trained = [folder for folder in folders if rundir.find_runs(folder)]
    alone = [folder for folder in folders if adapted[folder] and folder not in trained]
    if trained and alone:
        raise ConfigError(
            f"runs: {trained[0]} has trained models and {alone[0]} adapted ones; give them apart"
        )
    for folder in trained:
        if count := len(adapted[folder]):
            print(f"note: adaptations in {folder} are left out ({count}); give their folders alone")
    if not alone:
        return False
    given, default = dataclasses.asdict(arguments), dataclasses.asdict(Arguments())
    for name, value in given.items():
        if value != default[name] and name not in ("runs", "seed", "output_dir"):
            raise ConfigError(f"{name}: not for runs that adapted a model; seed, output_dir are")
    return True


def _folder(arguments: Arguments) -> Path:
    """For the report on folders of runs."""
    first = Path(arguments.runs[0])
    if arguments.output_dir:
        return Path(arguments.output_dir) / f"fit-{first.resolve().name}"
    return first / "fit"


def _read(arguments: Arguments) -> tuple[pd.DataFrame, Columns, Path]:
    """The runs, where they say what, and the folder for the report."""
    from tinygpt.scaling.runs import load_runs, read_table

    if arguments.table:
        table, source = read_table(arguments.table), Path(arguments.table)
        table = _with_tokens(_in_numbers(table, arguments), arguments.columns)
        folder = Path(arguments.output_dir or "outputs") / f"fit-{source.stem}"
        return table, _columns(table, arguments), folder
    table = load_runs(*arguments.runs)
    if table.empty:
        raise ConfigError(f"runs={','.join(arguments.runs)}: no runs in there")
    return table, _columns(table, arguments), _folder(arguments)


def _in_numbers(table: pd.DataFrame, arguments: Arguments) -> pd.DataFrame:
    """The named columns and the rates as numbers, thousands separated or not.  Raises
    ConfigError."""
    import pandas as pd

    named = dataclasses.asdict(arguments.columns)
    wanted = [named[name] for name in ("n", "d", "u", "t", "c")]
    for column in [*wanted, named["loss"] or arguments.loss, "learning_rate"]:
        if column not in table or pd.api.types.is_numeric_dtype(table[column]):
            continue
        found = pd.to_numeric(table[column].astype(str).str.replace(",", ""), errors="coerce")
        bad = found.isna() & table[column].notna()
        if bad.any():
            row = table.index[bad][0]
            value = f"{table[column][row]!s:.40}"
            raise ConfigError(f"{column}={value}: row {row}: must be a number")
        table = table.assign(**{column: found})
    return table


def _with_tokens(table: pd.DataFrame, columns: TableColumns) -> pd.DataFrame:
    """Of a table that gives parameters and FLOPs alone, the tokens by C = 6·N·D."""
    from tinygpt.scaling.fitting import COLUMNS

    n, c = columns.n, columns.c
    if columns.d is not None or COLUMNS["D"] in table or n not in table or c not in table:
        return table
    columns.d = f"{c} / (6 {n})"
    if (table[c] / (6 * table[n] ** 2)).median() > 1e5:
        raise ConfigError(
            f"columns.n={n}: with C = 6 N D there would be more than 100,000 tokens to a "
            "parameter; give parameters, not thousands or millions of them, or columns.d="
        )
    return table.assign(**{columns.d: (table[c] / (6 * table[n])).round()})


def _columns(table: pd.DataFrame, arguments: Arguments) -> Columns:
    """The columns that were named, and of the others those of ``results.json`` that are there.

    Raises ConfigError for a name that the table has not.
    """
    from tinygpt.scaling.columns import Columns

    given = {k: v for k, v in dataclasses.asdict(arguments.columns).items() if v is not None}
    for name, column in given.items():
        if column not in table:
            raise ConfigError(f"columns.{name}={column}: {_there_are(table, column)}")
    loss = given.get("loss", arguments.loss)
    if loss not in table:
        raise ConfigError(f"loss={loss}: {_there_are(table, loss)}")
    default = dataclasses.asdict(Columns(loss=loss))
    optional = {k: v if v in table else None for k, v in default.items() if k not in ("n", "d")}
    found = Columns(**{**default, **optional, **given})
    if "n" in given:
        found = dataclasses.replace(found, n_total=None)
    if not {found.n, found.d, found.t, found.c} & set(table):
        raise ConfigError(
            f"columns.n: name the column of the parameters (columns.d: of the tokens); "
            f"{_there_are(table)}"
        )
    return found


def _there_are(table: pd.DataFrame, meant: str = "") -> str:
    names = [str(name) for name in table]
    more = ", ..." if len(names) > 12 else ""
    near = checks.did_you_mean(meant, names) if meant else ""
    return f"no such column; there are {', '.join(names[:12])}{more}{near}"


if __name__ == "__main__":
    gc.disable()  # with many runs a fifth of these seconds would go into looking for garbage
    main()
    gc.freeze()  # nor does the interpreter look for it as it leaves
