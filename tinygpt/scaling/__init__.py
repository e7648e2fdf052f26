"""Turn run folders into scaling laws: a library for notebooks, without torch.

``load_runs`` reads runs into a table, ``fit`` fits a law to it, ``intervals`` and ``bootstrap``
give confidence intervals, ``frontier`` and ``predict`` split a budget; ``analyse`` does it all.
"""

from tinygpt.scaling.analysis import Analysis, analyse
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.fitting import Fit, fit
from tinygpt.scaling.frontier import Budget, Frontier, frontier, predict
from tinygpt.scaling.intervals import Interval, bootstrap, delta, intervals, of_loss, profile
from tinygpt.scaling.isoflop import Envelope, IsoFlop, envelope, isoflop
from tinygpt.scaling.laws import LAWS, Law, logaddexp, register, sum_of_powers
from tinygpt.scaling.runs import load_curves, load_runs
from tinygpt.scaling.split import best_split, by_law, flops_per_token, recorded
from tinygpt.scaling.tables import read_table

__all__ = [
    "LAWS",
    "Analysis",
    "Budget",
    "Columns",
    "Envelope",
    "Fit",
    "Frontier",
    "Interval",
    "IsoFlop",
    "Law",
    "analyse",
    "best_split",
    "bootstrap",
    "by_law",
    "delta",
    "envelope",
    "fit",
    "flops_per_token",
    "frontier",
    "intervals",
    "isoflop",
    "load_curves",
    "load_runs",
    "logaddexp",
    "of_loss",
    "predict",
    "profile",
    "read_table",
    "recorded",
    "register",
    "sum_of_powers",
]
