"""From run folders to scaling laws: a library for notebooks, without torch.

``load_runs`` makes a table, ``fit`` puts a law through it, ``intervals`` and ``bootstrap`` say how
far its numbers may be trusted, ``frontier`` splits a budget, ``analyse`` does all of it.
"""

from tinygpt.scaling.analysis import Analysis, Columns, analyse
from tinygpt.scaling.fitting import Fit, fit
from tinygpt.scaling.frontier import Frontier, frontier
from tinygpt.scaling.intervals import Interval, bootstrap, delta, intervals, of_loss, profile
from tinygpt.scaling.laws import LAWS, Law
from tinygpt.scaling.runs import load_runs, read_table

__all__ = [
    "LAWS",
    "Analysis",
    "Columns",
    "Fit",
    "Frontier",
    "Interval",
    "Law",
    "analyse",
    "bootstrap",
    "delta",
    "fit",
    "frontier",
    "intervals",
    "load_runs",
    "of_loss",
    "profile",
    "read_table",
]
