"""A law of the user's own, beside those of the table."""

from __future__ import annotations

import runpy

from tinygpt.config import ConfigError, first_line
from tinygpt.scaling.laws import LAWS, Law

BUILT_IN = frozenset(LAWS)
VARIABLES = (("x",), ("log x",), ("N", "D"), ("N", "D", "U"))


def register(law: Law) -> Law:
    """Add a law of one's own to those that are compared, behind the others.

    Raises ConfigError for one that cannot be fitted.
    """
    if law.name in BUILT_IN:
        raise ConfigError(f"law={law.name}: is one of tinygpt's own; choose another name")
    if law.variables not in VARIABLES:
        allowed = ", ".join(str(one) for one in VARIABLES)
        raise ConfigError(f"law={law.name}: variables={law.variables}: must be one of {allowed}")
    if (law.powers is None) == (law.expression is None):
        raise ConfigError(f"law={law.name}: give it either powers or an expression")
    LAWS[law.name] = law
    return law


def load(place: str) -> str:
    """Register the law that a Python file of the user's defines, as ``my_laws.py:shifted``, and
    return its name.  Raises ConfigError."""
    file, _, name = place.rpartition(":")
    try:
        found = runpy.run_path(file).get(name)
    except Exception as error:  # whatever the file does
        raise ConfigError(f"law={place}: {file}: {first_line(error)}") from error
    if not isinstance(found, Law):
        raise ConfigError(f"law={place}: {file} defines no Law called {name}")
    return register(found).name
