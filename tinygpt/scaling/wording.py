"""Format numbers and equations to the digits that the data support."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # evaluations import this module without laws
    from tinygpt.scaling.laws import Law

UNKNOWN = "–"


class Interval(Protocol):
    """Stand for the Interval of intervals.py, which imports this module."""

    @property
    def estimate(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` to ``digits`` significant digits; large and small ones as 3.28e10."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    return _to_place(value, _place_of(value) - digits + 1)


def whole(value: float) -> str:
    """Return a count in full and any other value to four digits."""
    return f"{value:,.0f}" if value == round(value) and value < 1e7 else number(value, 4)


def percent(value: float) -> str:
    return f"{number(100 * value, 2)} %"


def times(ratio: float) -> str:
    """Return ``×3.2`` or ``×1,000``."""
    return f"×{ratio:,.0f}" if ratio >= 100 else f"×{ratio:.3g}"


def letter(value: float) -> str:
    """Return ``500k`` or ``2.5M``, for axis ticks."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 1e15 > value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


def count(number: int, word: str, many: str = "") -> str:
    """Return ``1 run`` or ``2 runs``; ``many`` is an irregular plural."""
    return f"{number:,} {word if number == 1 else many or word + 's'}"


def span(values: Any) -> list[str]:
    """Return the minimum, the maximum, their ratio, and the number of distinct values."""
    low, high = float(min(values)), float(max(values))
    return [whole(low), whole(high), f"×{number(high / low)}", str(len(set(values)))]


def differing(setting: str, values: Mapping[str, Sequence[str]]) -> str:
    """Return ``max_seq_len`` 256 (10 runs), 128 (1 run: its name)."""
    each = []
    for value, names in list(values.items())[:4]:
        shown = value[:12] if "fingerprint" in setting else value
        name = f": {names[0]}" if len(names) == 1 else ""
        each.append(f"{shown} ({count(len(names), 'run')}{name})")
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
    """Return the ends of an interval in words."""
    if interval is None:
        return UNKNOWN
    low, high = (_end(end, interval) for end in (interval.low, interval.high))
    if is_set(interval.low):
        return f"{low} to {high}" if is_set(interval.high) else f"above {low}, no upper end"
    return f"below {high}, no lower end" if is_set(interval.high) else "not set by the data"


def with_interval(interval: Interval) -> str:
    """Return ``0.58 (0.43 to 0.77)``."""
    return f"{estimate(interval.estimate, interval)} ({reach(interval)})"


def is_set(end: float) -> bool:
    """Return whether the data determine this end of an interval."""
    return math.isfinite(end) and end != 0.0


def _end(value: float, interval: Interval) -> str:
    """Return an end to the digits of the estimate, or to two digits if it is decades away."""
    text = _to_place(value, _place(interval)) if is_set(value) else ""
    far = abs(value) > 100 * abs(interval.estimate) > 0 or (text == "0" and value > 0)
    return number(value, 2) if far else text


def _place(interval: Interval) -> int:
    """Return the power of ten of the second digit of an interval's half width."""
    value = interval.estimate
    half = max((abs(e - value) for e in (interval.low, interval.high) if is_set(e)), default=0)
    if half == 0:
        return _place_of(value or 1.0) - 2
    return min(_place_of(half) - 1, _place_of(value or half))  # keep the estimate's first digit


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
    """Return the formula of a law, without the terms that its fit dropped."""
    if law.powers is None:
        return law.formula
    terms = []
    for coefficient, powers in law.powers.items():
        bases = {x: f"(ln {x[4:]})" if x.startswith("log ") else x for x in powers}
        below = " ".join(f"{bases[x]}^{exponent}" for x, exponent in powers.items())
        terms.append(f"{coefficient} / {below}" if below else coefficient)
    return f"L = {' + '.join(terms)}"


def equation(law: Law, parameters: Mapping[str, float]) -> str:
    """Return the formula with its parameters to four digits; an E that vanished is 0."""
    text = formula(law)
    for name in law.parameters:
        vanished = name == "E" and abs(parameters[name]) < 1e-4  # such fits end anywhere below
        value = "0" if vanished else number(parameters[name], 4)
        value = f"({value})" if value.startswith("-") else value
        text = re.sub(rf"(?<!\w){name}(?!\w)", value, text)
    return re.sub(r"([\d)]) (?=[\d(]\S*\))", r"\1·", text)


def variables(words: Mapping[str, str]) -> str:
    """Return the meaning of each letter of a law."""
    return ", ".join(f"{name}: {word}" for name, word in words.items())
