"""Run ``python -m tinygpt.fit``: fit a scaling law to runs and write its report and figures."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from tinygpt import cli, fileio
from tinygpt.config import ConfigError, key
from tinygpt.data.survey import many
from tinygpt.runs import rundir

if TYPE_CHECKING:
    import pandas as pd

    from tinygpt.scaling.elsewhere import Table

USAGE = """\
tinygpt fit outputs/width [key=value ...]

runs=FOLDER[,FOLDER]    runs, studies or outputs/ as a whole, runs= may be left out; adaptations
                        (adapt.jsonl) take seed=, output_dir= and force= only
table=FILE              instead: a table, one row per run (docs/laws.md: files, dialects, numbers);
                        name its columns by
                        columns.n= d= u= t= c= loss= seed= run= learning_rate=
                        (parameters, tokens, unique tokens, context, FLOPs, loss, seed, name);
                        columns with usual names (params, tokens, val_loss, ...) are found;
                        =none: there is none
units.n=1e6             what a table counts in: units.n= d= u= c= (units.c=8.64e19: PFLOP-days)
loss_unit=TEXT          of a table's loss, as 'nats per token'; perplexity: its logarithm is fitted
decimal=,               the decimal mark of a table in which a comma could be either
last=5                  of a table of checkpoints: a run is one row, its loss that of its last 5
where=CONDITION         only these runs, as 'params > 1e6' or 'outlier == 0'; the others are listed
law=auto                the best by AICc, or the name of one: power power_constant log_power broken
                        chinchilla chinchilla_tied chinchilla_zero kaplan kaplan_constant coupled
                        data_constrained
                        or FILE.py:NAME, one of your own (docs/laws.md)
variable=auto           the variable of a law in one variable: N D U T C
loss=final_val_loss     the column of the loss; final_val_bits_per_byte compares tokenizers
estimator=auto          least_squares huber likelihood
threshold=NUMBER        of huber, in units of the noise
objective=log           raw: residuals of the loss itself, not of its logarithm
budgets=1e15,1e16       FLOPs to split between parameters and tokens
predict=PLACES          the loss, with its interval, at '[{n: 13e9, d: 5e12}, {n: 7e9, d: 2e12}]';
                        a law in one variable takes n, d, u, t or c alone
isoflop=cubic           the curve through the runs of a budget: cubic akima parabola
seed=0                  of the bootstrap and of random starts
compare=KEY             what each value of a key, as optim.kind, is worth in compute at equal loss;
                        compare=[outputs/a,outputs/b]: two studies, or more, side by side
reference=VALUE         of compare: the value, or the study, that the others are compared with
output_dir=FOLDER       where to put a folder fit-<names>; default: fit/ in one folder of
                        runs, fit-a-b beside a and b, outputs/fit-a-x for a/x.csv
force=true              replace the fit of another table or of other runs there
"""


@dataclass
class TableColumns:
    """Name the column of each quantity in a table from elsewhere."""

    n: Optional[str] = None
    d: Optional[str] = None
    u: Optional[str] = None
    t: Optional[str] = None
    c: Optional[str] = None
    loss: Optional[str] = None
    seed: Optional[str] = None
    run: Optional[str] = None
    learning_rate: Optional[str] = None


@dataclass
class TableUnits:
    """Hold the unit of each count in a table from elsewhere: 1e6 for millions."""

    n: Optional[float] = key(None, above=0.0)
    d: Optional[float] = key(None, above=0.0)
    u: Optional[float] = key(None, above=0.0)
    c: Optional[float] = key(None, above=0.0)


@dataclass
class Arguments:
    runs: list[str] = field(default_factory=list)
    table: Optional[str] = None
    columns: TableColumns = field(default_factory=TableColumns)
    units: TableUnits = field(default_factory=TableUnits)
    loss_unit: Optional[str] = None
    decimal: Optional[str] = key(None, among=(",", "."))
    last: Optional[int] = key(None, least=1)
    where: Optional[str] = None
    law: str = "auto"
    variable: str = "auto"
    loss: str = "final_val_loss"
    estimator: str = "auto"
    threshold: Optional[float] = key(None, above=0.0)
    objective: str = key("log", among=("log", "raw"))
    budgets: list[float] = field(default_factory=list)
    predict: Optional[str] = None
    isoflop: str = key("cubic", among=("cubic", "akima", "parabola"))
    seed: int = key(0, least=0)
    compare: list[str] = field(default_factory=list)
    reference: Optional[str] = None
    output_dir: Optional[str] = None
    force: bool = False


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE, bare="runs")
    if arguments.reference and not arguments.compare:
        raise ConfigError("reference: for compare= only")
    if len(arguments.compare) > 1:  # studies
        if arguments.runs or arguments.table:
            raise ConfigError("compare: give runs= and one key, or the folders of studies alone")
        arguments.runs = arguments.compare
    if bool(arguments.runs) == bool(arguments.table):
        raise ConfigError("runs: give runs=FOLDER, or table=FILE")
    folder = _folder(arguments)
    if _are_adaptations(arguments):
        cli.announce("loading")
        from tinygpt.adaptation import report as adaptation_report

        made = adaptation_report.make(arguments.runs, folder, arguments.seed)
        adaptation_report.show(made, folder)
        return
    keys = [f"units.{name}" for name, unit in vars(arguments.units).items() if unit is not None]
    keys += [n for n in ("loss_unit", "decimal", "last") if getattr(arguments, n) is not None]
    keys += ["columns.learning_rate"] if arguments.columns.learning_rate is not None else []
    if keys and not arguments.table:
        raise ConfigError(f"{keys[0]}: for table= only; a run's own folder says it")
    if arguments.compare:
        _compare(arguments)
        return
    source = _source(arguments, folder)
    cli.announce("loading")
    from tinygpt.scaling import laws
    from tinygpt.scaling.columns import read_places

    places = [] if arguments.predict is None else read_places(arguments.predict)
    law = laws.load(arguments.law) if ".py:" in arguments.law else arguments.law
    table, curves = _read(arguments), None
    from tinygpt.scaling import report  # scipy and matplotlib: once there is something to fit
    from tinygpt.scaling.analysis import analyse
    from tinygpt.scaling.story import Story

    if arguments.runs:
        import pandas as pd

        from tinygpt.scaling.runs import curves_of

        curves = curves_of(pd.concat([table.runs, table.left_out]).sort_index())
    cli.announce(f"fitting {many(len(table.runs), 'run')}")
    names = ("variable", "estimator", "threshold", "objective", "budgets", "isoflop", "seed")
    given = {name: getattr(arguments, name) for name in names}
    given |= {"law": law, "places": places, "curves": curves, "condition": arguments.where}
    analysis = analyse(table.runs, table.left_out, table.columns, notes=table.notes, **given)
    cli.announce("drawing")
    story = Story.read(Path(arguments.runs[0])) if len(arguments.runs) == 1 else None
    report.write(analysis, folder, story, arguments.table, source)
    report.show(analysis, folder, table=arguments.table)


def _are_adaptations(arguments: Arguments) -> bool:
    """Return whether the runs are adaptations; in a folder that also has trainings, these count.

    Raises ConfigError for folders of both kinds, and for keys that adaptations do not take.
    """
    folders = [Path(name) for name in arguments.runs]
    for folder, name in zip(folders, arguments.runs, strict=True):
        if not folder.is_dir():
            instead = f"a file; did you mean table={name}?" if folder.is_file() else ""
            raise ConfigError(f"runs={name}: {instead or 'no such folder'}")
    adapted = {folder: len(list(folder.rglob("adapt.jsonl"))) for folder in folders}
    trained = [folder for folder in folders if rundir.find_runs(folder)]
    alone = [folder for folder in folders if adapted[folder] and folder not in trained]
    if trained and alone:
        raise ConfigError(
            f"runs: {trained[0]} has trained models and {alone[0]} adapted ones; fit each alone"
        )
    for folder in trained:
        if count := adapted[folder]:
            print(f"note: adaptations in {folder} are left out ({count}); give their folders alone")
    if alone:
        used = ("runs", "seed", "output_dir", "force")
        _refuse(arguments, used, "not for runs that adapted a model; seed, output_dir are")
    return bool(alone)


def _refuse(arguments: Arguments, used: Sequence[str], why: str) -> None:
    """Raise ConfigError for a key that was given but is not among ``used``."""
    default = Arguments()
    for name, value in vars(arguments).items():
        if value != getattr(default, name) and name not in used:
            raise ConfigError(f"{name}: {why}")


def _folder(arguments: Arguments) -> Path:
    """Return the folder of the report; it tells tables of one name in two folders apart."""
    if arguments.table:
        table, packed = Path(arguments.table).resolve(), r"(\.\w+)?\.(gz|bz2|xz|zst|zip)$|\.\w+$"
        stem = re.sub(packed, "", table.name, flags=re.IGNORECASE)
        name = stem if table.parent == Path.cwd() else f"{table.parent.name}-{stem}"
        return Path(arguments.output_dir or "outputs") / f"fit-{name}"
    runs = [Path(name) for name in arguments.runs]
    if len(runs) == 1 and not arguments.output_dir:
        return runs[0] / "fit"
    if len({path.is_absolute() for path in runs}) > 1:
        runs = [path.absolute() for path in runs]
    parent = arguments.output_dir or os.path.commonpath([path.parent for path in runs])
    return Path(parent) / f"fit-{'-'.join(path.resolve().name for path in runs):.80}"


def _source(arguments: Arguments, folder: Path) -> list[str] | None:
    """Return the table or the runs as paths from ``folder``, or None if it lies in the runs.

    Raises ConfigError if the folder holds the fit of something else.
    """
    if folder.name == "fit":
        return None
    places = [arguments.table] if arguments.table else arguments.runs
    try:
        source = [Path(os.path.relpath(place, folder)).as_posix() for place in places]
    except ValueError:  # on another drive
        source = [Path(place).resolve().as_posix() for place in places]
    if (folder / "fit.json").exists():
        before = fileio.read_json(folder / "fit.json").get("source")
        if before != source and not arguments.force:
            of = ", ".join(os.path.normpath(folder / one) for one in before or ["something else"])
            raise ConfigError(f"{folder}: holds the fit of {of}; force=true replaces it")
        print(f"note: replacing the fit in {folder}")
    return source


def _compare(arguments: Arguments) -> None:
    """Compare recipes, the values of a key or whole studies, and write the report."""
    used = "runs table columns units loss loss_unit decimal last where compare reference output_dir"
    _refuse(arguments, used.split(), f"not for compare=, which takes {', '.join(used.split())}")
    cli.announce("loading")
    from tinygpt.scaling import versus
    from tinygpt.scaling.runs import load_runs

    key, notes, last = arguments.compare[0], list[str](), f"-{arguments.compare[0]}"
    if arguments.table:
        conditions = versus.conditions(arguments.table, key, arguments.where)
        each = {name: dataclasses.replace(arguments, where=one) for name, one in conditions.items()}
        sides = {name: _read(one) for name, one in each.items()}
    else:
        if len(arguments.compare) > 1:
            parts = {Path(one).resolve().name: load_runs(one) for one in arguments.compare}
            key, last = "studies", ""  # the folder already has their names
        else:
            parts = versus.split(load_runs(*arguments.runs), key)[0]
        arguments.loss = versus.loss_of(parts, arguments.loss, notes)
        sides = {name: _side(part, arguments, name) for name, part in parts.items()}
    cli.announce(f"comparing {many(sum(len(one.runs) for one in sides.values()), 'run')}")
    comparison = versus.compare(sides, key, arguments.reference, notes)
    folder = _folder(arguments)
    folder = folder.with_name(f"{folder.name.replace('fit', 'compare', 1)}{last}")
    versus.write(comparison, folder)
    versus.show(comparison, folder)


def _read(arguments: Arguments) -> Table:
    """Return the runs of the table or the folders, with the columns of each quantity."""
    from tinygpt.scaling.elsewhere import read
    from tinygpt.scaling.runs import load_runs

    if not arguments.table:
        return _side(load_runs(*arguments.runs), arguments)
    keys = ("loss", "loss_unit", "decimal", "last", "where")
    given = {name: getattr(arguments, name) for name in keys}
    return read(arguments.table, vars(arguments.columns), units=vars(arguments.units), **given)


def _side(table: pd.DataFrame, arguments: Arguments, name: str = "") -> Table:
    """Return the runs of our own that can enter one law, and those left out."""
    from tinygpt.scaling.elsewhere import Table, find_columns
    from tinygpt.scaling.runs import comparable

    if table.empty:
        raise ConfigError(f"runs={','.join(arguments.runs)}: no runs in there {name}".rstrip())
    named = {name: column for name, column in vars(arguments.columns).items() if column is not None}
    columns, _ = find_columns(table, named, arguments.loss)
    used, left_out = comparable(table, columns.loss, arguments.where)
    return Table(used, left_out, columns, [])


if __name__ == "__main__":
    gc.disable()  # with many runs, collecting garbage would take a fifth of the time
    main()
    gc.freeze()  # spares the collection at exit
