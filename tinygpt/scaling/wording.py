"""Numbers and equations as a reader wants them: to the digits that the data support."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # figures of evaluations want no law
    from tinygpt.scaling.laws import Law

UNKNOWN = "–"


class Interval(Protocol):
    """Stand for an Interval of intervals.py, which prints by this module."""

    @property
    def estimate(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` to so many significant digits, large and small ones as 3.28e10."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    return _to_place(value, _place_of(value) - digits + 1)


def whole(value: float) -> str:
    """Return ``value`` in full if it is a count, else to four digits."""
    return f"{value:,.0f}" if value == round(value) and value < 1e7 else number(value, 4)


def percent(value: float) -> str:
    return f"{number(100 * value, 2)} %"


def times(ratio: float) -> str:
    """Return ``×3.2`` or ``×1,000``."""
    return f"×{ratio:,.0f}" if ratio >= 100 else f"×{ratio:.3g}"


def letter(value: float) -> str:
    """Return ``500k`` or ``2.5M``, as the ticks of an axis need it."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 1e15 > value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


def count(number: int, word: str, many: str = "") -> str:
    """Return ``1 run`` or ``2 runs``; ``many`` is a plural that is not the word with an s."""
    return f"{number:,} {word if number == 1 else many or word + 's'}"


def span(values: Any) -> list[str]:
    """Return the least, the greatest, their ratio, and how many different values there are."""
    low, high = float(min(values)), float(max(values))
    return [whole(low), whole(high), f"×{number(high / low)}", str(len(set(values)))]


def differing(setting: str, values: Mapping[str, Sequence[str]]) -> str:
    """Return ``max_seq_len`` 256 (10 runs), 128 (1 run: its name)."""
    each = []
    for value, names in list(values.items())[:4]:
        shown = value[:12] if "fingerprint" in setting else value
        alone = f": {names[0]}" if len(names) == 1 else ""
        each.append(f"{shown} ({count(len(names), 'run')}{alone})")
    more = f" and {len(values) - 4} other values" if len(values) > 4 else ""
    return f"`{setting}` {', '.join(each)}{more}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def estimate(value: float, interval: Interval | None) -> str:
    """Return ``value`` to the digits its interval supports."""
    if interval is None or math.isnan(value):
        return number(value)
    if not (is_set(interval.low) or is_set(interval.high)):
        return number(value, 2)
    return _to_place(value, _place(interval))


def reach(interval: Interval | None) -> str:
    """Return the two ends of an interval in words."""
    if interval is None:
        return UNKNOWN
    low, high = (_end(end, interval) for end in (interval.low, interval.high))
    match is_set(interval.low), is_set(interval.high):
        case True, True:
            return f"{low} to {high}"
        case True, False:
            return f"above {low}, no upper end"
        case False, True:
            return f"below {high}, no lower end"
    return "not set by the data"


def with_interval(interval: Interval) -> str:
    """Return ``0.58 (0.43 to 0.77)``."""
    return f"{estimate(interval.estimate, interval)} ({reach(interval)})"


def is_set(end: float) -> bool:
    """Return whether the data set this end of an interval."""
    return math.isfinite(end) and end != 0.0


def _end(value: float, interval: Interval) -> str:
    """Return an end to the digits of the estimate; if it is decades away, to two digits."""
    text = _to_place(value, _place(interval)) if is_set(value) else ""
    far = abs(value) > 100 * abs(interval.estimate) > 0 or (text == "0" and value > 0)
    return number(value, 2) if far else text


def _place(interval: Interval) -> int:
    """Return the power of ten of the second digit of half the width of an interval."""
    value = interval.estimate
    widths = [abs(end - value) for end in (interval.low, interval.high) if is_set(end)]
    half = max(widths, default=0)
    if half == 0:
        return _place_of(value or 1.0) - 2
    return min(_place_of(half) - 1, _place_of(value or half))  # never rounded away altogether


def _place_of(value: float) -> int:
    """Return the power of ten of the first digit of ``value``."""
    return math.floor(math.log10(abs(value)))


def _to_place(value: float, place: int) -> str:
    """Return ``value`` rounded to 10^place."""
    if abs(value) < 0.5 * 10.0**place:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{round(value, -place):.{max(0, -place)}f}"
    mantissa, _, exponent = f"{value:.{max(0, _place_of(value) - place)}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def formula(law: Law) -> str:
    """Return the formula of a law; if it has lost a term, what is left of it."""
    if law.powers is None:
        return law.formula
    terms = []
    for coefficient, powers in law.powers.items():
        bases = {x: f"(ln {x[4:]})" if x.startswith("log ") else x for x in powers}
        below = " ".join(f"{bases[x]}^{exponent}" for x, exponent in powers.items())
        terms.append(f"{coefficient} / {below}" if below else coefficient)
    return f"L = {' + '.join(terms)}"


def equation(law: Law, parameters: Mapping[str, float]) -> str:
    """Return the formula with its numbers, to four digits: they are to be used together."""
    text = formula(law)
    for name in law.parameters:
        value = number(parameters[name], 4)
        shown = f"({value})" if value.startswith("-") else value
        text = re.sub(rf"(?<!\w){name}(?!\w)", shown, text)
    return re.sub(r"([\d)]) (?=[\d(]\S*\))", r"\1·", text)


def variables(words: Mapping[str, str]) -> str:
    """Return the meaning of each letter of a law."""
    return ", ".join(f"{name}: {word}" for name, word in words.items())
