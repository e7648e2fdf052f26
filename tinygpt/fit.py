"""``python -m tinygpt.fit``: runs to scaling laws, figures and a report."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Optional

from tinygpt import cli
from tinygpt.config import ConfigError, key

USAGE = """\
python -m tinygpt.fit runs=outputs/width [key=value ...]

runs=FOLDER[,FOLDER]    runs, studies or outputs/ as a whole
table=FILE              instead: a .csv or .parquet with a row a run; its columns are named by
                        columns.n= d= u= t= c= loss= seed= run=
                        (parameters, tokens, unique tokens, context, FLOPs, loss, seed, name)
law=auto                the best by AICc, or the name of one: power power_constant log_power broken
                        chinchilla chinchilla_tied chinchilla_zero kaplan kaplan_constant coupled
                        data_constrained
variable=auto           what a law in one variable goes by: N D U T C
loss=final_val_loss     the column of the loss; final_val_bits_per_byte compares tokenizers
estimator=auto          least_squares huber absolute likelihood
threshold=NUMBER        of huber, in units of the noise; threshold_unit=absolute: in log L
budgets=1e15,1e16       FLOPs to split between parameters and tokens
seed=0                  of the bootstrap and of random starts
output_dir=FOLDER       default: fit/ in the folder of the runs
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
    law: str = "auto"
    variable: str = "auto"
    loss: str = "final_val_loss"
    estimator: str = "auto"
    threshold: Optional[float] = key(None, above=0.0)
    threshold_unit: str = key("noise", among=("noise", "absolute"))
    budgets: list[float] = field(default_factory=list)
    seed: int = key(0, least=0)
    output_dir: Optional[str] = None


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    if bool(arguments.runs) == bool(arguments.table):
        raise ConfigError("runs: give runs=FOLDER, or table=FILE")
    from tinygpt.scaling import report

    table, columns, folder = _read(arguments)
    report.write(table, columns, folder, arguments)


if __name__ == "__main__":
    main()
