"""Where a search for the optimum begins: the minima on a grid, or many places spread out."""

from __future__ import annotations

import itertools
import warnings

import numpy as np

from tinygpt.scaling.laws import Array, Law
from tinygpt.scaling.newton import NDBool, bounds
from tinygpt.scaling.points import Points

EXPONENTS = np.geomspace(0.015, 2.4, 34)
N_STARTS = 1024  # of a law that is no sum of powers; the best are polished
N_POLISHED = 32
# Where the starts of a law that is no sum of powers lie: exponents, logarithms of coefficients
# (of a term: relative to the least loss).
LIKELY = {
    "E": (-3.0, 0.0),
    "A": (-4.0, 1.0),
    "B": (-4.0, 1.0),
    "Nc": (-4.0, 1.0),
    "Dc": (-4.0, 1.0),
    "alpha": (0.03, 1.0),
    "beta": (0.03, 1.0),
    "gamma": (0.3, 2.0),
    "c": (-0.6, 0.9),
    "f": (-3.0, 1.0),
    "rn": (0.0, 4.0),
    "rd": (0.0, 4.0),
    "x1": (0.0, 1.0),
}


def grid_starts(law: Law, points: Points) -> Array:
    """The local minima of a sum of powers over a grid of its exponents, (B, P).

    At each node the coefficients that minimise the sum of squared relative errors, none of them
    negative, follow in closed form.
    """
    assert law.powers is not None
    loss = np.exp(points.y)
    columns, axes = [], []
    for powers in law.powers.values():
        if powers:
            ((variable, exponent),) = powers.items()
            columns.append(np.exp(-np.outer(EXPONENTS, points.x[variable])) / loss)
            axes.append(law.exponents.index(exponent))
        else:
            columns.append(1 / loss[None])
            axes.append(-1)
    shape = (len(EXPONENTS),) * len(law.exponents)
    kinds = len(columns)
    gram = np.empty((*shape, kinds, kinds))
    target = np.empty((*shape, kinds))
    for k, m in itertools.product(range(kinds), repeat=2):
        gram[..., k, m] = _on_mesh(columns[k], columns[m], axes[k], axes[m], len(shape))
    for k in range(kinds):
        target[..., k] = _on_mesh(columns[k], np.ones((1, len(points))), axes[k], -1, len(shape))
    best, coefficients = _non_negative(gram, target)
    nodes = np.argwhere(_local_minima(best))
    order = np.argsort(best[tuple(nodes.T)], kind="stable")[:8]
    starts = []
    for node in nodes[order]:
        found = np.maximum(coefficients[tuple(node)], 1e-6)
        starts.append(np.concatenate([np.log(found), EXPONENTS[node]]))
    return np.array(starts)


def _on_mesh(one: Array, other: Array, axis: int, other_axis: int, dimensions: int) -> Array:
    """Σ over the points of the products of two families of columns, on the mesh of exponents."""
    if axis == other_axis or axis < 0 or other_axis < 0:
        sums = np.einsum("gn,gn->g", *np.broadcast_arrays(one, other))
        shape = [1] * dimensions
        if max(axis, other_axis) >= 0:
            shape[max(axis, other_axis)] = len(sums)
        return np.asarray(sums.reshape(shape))
    products = one @ other.T
    return products if axis < other_axis else products.T


def _non_negative(gram: Array, target: Array) -> tuple[Array, Array]:
    """min over c >= 0 of cᵀGc - 2 tᵀc at every node, by trying each set of active terms."""
    kinds = target.shape[-1]
    best = np.full(target.shape[:-1], np.inf)
    coefficients = np.zeros(target.shape)
    for count in range(1, kinds + 1):
        for active in itertools.combinations(range(kinds), count):
            part = gram[..., active, :][..., active]
            part = part + 1e-13 * np.trace(part, axis1=-2, axis2=-1)[..., None, None] * np.eye(
                count
            )
            wanted = target[..., active]
            found = np.linalg.solve(part, wanted[..., None])[..., 0]
            value = -np.sum(found * wanted, axis=-1)
            take = (found >= 0).all(axis=-1) & (value < best)
            best[take] = value[take]
            filled = np.zeros(target.shape)
            filled[..., active] = found
            coefficients[take] = filled[take]
    return best, coefficients


def _local_minima(surface: Array) -> NDBool:
    from scipy.ndimage import minimum_filter

    return np.asarray(surface <= minimum_filter(surface, size=3, mode="nearest"))


def spread_starts(law: Law, points: Points, seed: int) -> Array:
    """Starts for any law: a Sobol sequence over what its parameters may reasonably be."""
    from scipy.stats import qmc  # slow to import

    names = law.parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # balance needs no power of two here
        unit = qmc.Sobol(len(names), seed=seed).random(N_STARTS)
    ends = np.array([LIKELY.get(name) or _likely(law, name) for name in names])
    starts = ends[:, 0] + unit * (ends[:, 1] - ends[:, 0])
    least = points.y.min()
    for j, name in enumerate(names):
        if name in (law.powers or ("E", "A", "B")):
            starts[:, j] += least
        if name in ("Nc", "Dc"):  # its power is what is about as large as the loss
            exponent = starts[:, names.index("alpha" if name == "Nc" else "beta")]
            starts[:, j] = (starts[:, j] + least) / exponent
        if name == "x1":
            starts[:, j] = np.quantile(points.x["x"], unit[:, j])
    starts = np.clip(starts, *bounds(law, points))
    with np.errstate(all="ignore"):
        found = np.sum((law.log_loss(starts, points.x) - points.y) ** 2, axis=1)
    best: Array = starts[np.argsort(np.where(np.isfinite(found), found, np.inf))[:N_POLISHED]]
    return best


def _likely(law: Law, name: str) -> tuple[float, float]:
    """Where to look for a parameter of a law of the user's: within its bounds, if it has any."""
    if name in law.bounds:
        ends = np.array(law.bounds[name], dtype=float)
        with np.errstate(divide="ignore"):
            ends = np.log(ends) if name in law.coefficients else ends
        low, high = np.clip(ends, -10.0, 10.0).tolist()
        return low, high
    return (-4.0, 2.0) if name in law.coefficients else (0.03, 1.0)


def without_constant(law: Law, points: Points, starts: Array) -> Array:
    """The same starts with E at zero: a slope in E may lead away from a best that has none."""
    zero = starts[: N_POLISHED // 4].copy()
    j = law.parameters.index("E")
    zero[:, j] = bounds(law, points)[0][j]
    return zero
