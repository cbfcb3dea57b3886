"""Oracles for people who write a sparsifier or a backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import kernels
from msbp_jax.formats import Columns, Format, take_columns
from msbp_jax.sparsifiers import Sparsifier, Stays, Where
from msbp_jax.sparsifiers._base import serving

# By chance a mean of 4,000 draws is off by more than 5 standard errors once in two million entries. A bias of a tenth
# of a standard deviation is 6 standard errors, and does not pass.
_DRAWS, _STANDARD_ERRORS = 4000, 5.0


def check_sparsifier(sparsifier: Sparsifier, *, rows: int = 12, n: int = 96, unbiased: bool = False) -> None:
    r"""Check that a sparsifier keeps the contract of `msbp.Sparsifier`.

    It calls `init` on shapes alone, and `apply` eagerly and under jit, vmap and scan, in three dtypes, on several
    shapes, on ties and on zeros. With `unbiased`, it also checks `E[S(u)] = u` over fixed seeds, entry by entry.

    Args:
      sparsifier: What to check.
      rows: Rows of the gradient to check it on.
      n: Features of the gradient to check it on.
      unbiased: Whether to check `E[S(u)] = u`, too; the state must hold a PRNG key.

    Raises:
      AssertionError: It breaks the contract; the message says where, and what is expected.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.testing.check_sparsifier(msbp.random_k(density=0.25, rescale=True), unbiased=True)
    """
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        _check_on(sparsifier, random_gradient(0, rows, n).astype(dtype))
    for shape in ((1, n), (rows + 1, n), (rows, n + 7)):
        _check_on(sparsifier, random_gradient(1, *shape))
    _check_on(sparsifier, jnp.ones((rows, n)))
    _check_on(sparsifier, jnp.zeros((rows, n)))
    _check_under_transformations(sparsifier, random_gradient(2, rows, n))
    if unbiased:
        _check_unbiased(sparsifier, random_gradient(3, rows, n))


def check_backend(backend: str) -> None:
    """Check the ops that a backend has against NumPy, and float64 products of the materialized cotangent.

    Args:
      backend: Name of a backend.

    Raises:
      AssertionError: A result is off by more than the rounding of its dtype.
      ValueError: No backend of that name.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.testing.check_backend("xla")
    """
    known = kernels.backends()
    if backend not in known["grad_input"]:
        raise ValueError(f"There is no backend {backend!r}. Expected one of: {', '.join(known['grad_input'])}.")
    for rows, m, n, k, group in ((8, 5, 7, 3, 1), (9, 4, 33, 5, 4), (16, 130, 64, 64, None), (3, 1, 9, 1, 2)):
        u, x, w = random_gradient(0, rows, n), random_gradient(1, rows, m), random_gradient(2, m, n)
        p = kernels.select(u, k, group, backend=backend if backend in known["select"] else None)
        chosen = np.sort(np.asarray(p.index), axis=1)
        _demand(np.array_equal(chosen, _best_columns(u, k, group)), "select chose other columns", backend)
        _demand(_equal(p.values, take_columns(u, p.index, group).values), "select took other entries", backend)
        for memory in (random_gradient(3, 1, n)[0], random_gradient(3, rows, n)):
            _check_memory(backend if backend in known["select_with_memory"] else None, u, memory, k, group)
        for axis in (0, 1):
            oriented = w if axis == 1 else w.T
            dx = kernels.grad_input(p, oriented, axis, backend=backend)
            dw = kernels.grad_weight(p, x, axis, backend=backend)
            true_dx, true_dw = dense_products(p, x, oriented, axis)
            _demand(_close(dx, true_dx), f"grad_input is off with feature_axis={axis}", backend)
            _demand(_close(dw, true_dw), f"grad_weight is off with feature_axis={axis}", backend)


def _check_memory(backend: str | None, g: jax.Array, memory: jax.Array, k: int, group: int | None) -> None:
    """Check `select_with_memory`, the first row taking no part."""
    g = g.at[0].set(0)
    live = np.asarray(g).any(axis=1, keepdims=True)
    p, left, rows = kernels.select_with_memory(g, memory, k, group, backend=backend)
    u = np.where(live, np.asarray(g + (memory if memory.ndim == 2 else memory[None])), 0)
    chosen = np.sort(np.asarray(p.index), axis=1)
    where = backend or "the chosen backend"
    _demand(np.array_equal(chosen, _best_columns(u, k, group)), "with a memory, select chose other columns", where)
    want = u - np.asarray(p.materialize())
    _demand(_close(left, want if memory.ndim == 2 else want.sum(0)), "what is left for the memory is off", where)
    counted = live if memory.ndim == 2 else live.sum(0)
    _demand(np.array_equal(rows, counted), "the rows that took part are others", where)


def dense_products(p: Format, x: Any, w: Any, feature_axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `(dx, dw) = (p wᵀ, xᵀ p)` in float64, from the materialized cotangent.

    Args:
      p: The cotangent, representing `[rows, n]`.
      x: `[rows, m]`.
      w: `[m, n]` if `feature_axis` is 1, `[n, m]` if it is 0; `dw` is oriented like it.
      feature_axis: Where n stands in `w`.
    """
    dense, x, w = (np.asarray(a, np.float64) for a in (written_out(p), x, w))
    dw = x.T @ dense
    return (dense @ w.T, dw) if feature_axis == 1 else (dense @ w, dw.T)


def random_gradient(seed: int, rows: int, n: int) -> jax.Array:
    """Return a heavy-tailed float32 matrix, `[rows, n]`, as gradients are: a normal times a log-normal."""
    draw = np.random.default_rng(seed)  # NumPy's generator is not compiled for each shape
    return jnp.asarray(draw.normal(size=(rows, n)) * np.exp(draw.normal(size=(rows, n))), jnp.float32)


def written_out(p: Format) -> np.ndarray:
    """Return the matrix that a format stands for, `[rows, n]`, in float64; of `Columns` by NumPy, not by themselves."""
    if not isinstance(p, Columns):
        return np.asarray(p.materialize(), np.float64)
    values = np.asarray(p.values, np.float64)
    if p.scale is not None:
        values = values * np.asarray(p.scale, np.float64)[:, None, None]
    rows, n = p.shape
    groups, r, _ = values.shape
    matrix = np.zeros((groups, r, n))
    np.put_along_axis(matrix, np.asarray(p.index)[:, None].repeat(r, axis=1), values, axis=2)
    return matrix.reshape(-1, n)[:rows]


def _check_on(sparsifier: Sparsifier, u: jax.Array) -> None:
    aval = jax.ShapeDtypeStruct(u.shape, u.dtype)
    where = f"{sparsifier.name} on {u.shape} {u.dtype}"
    state = sparsifier.init(aval)
    for leaf in jax.tree.leaves(state):
        _demand(isinstance(leaf, jax.Array), f"init returned a leaf that is no array: {leaf!r}", where)
    p, after = sparsifier.apply(u, state)
    _demand(isinstance(p, Format), f"apply must return a Format such as Columns, got {type(p).__name__}", where)
    _demand(p.shape == u.shape, f"it represents shape {p.shape}, expected {u.shape}", where)
    for fault in p.faults(u, exact=not jax.tree.leaves(state)):
        _demand(False, fault, where)
    _demand(_types(after) == _types(state), f"the state became {_types(after)}, expected {_types(state)}", where)
    serves = serving(sparsifier, Where(u.shape[0], u.shape[1], 1, u.dtype))
    if isinstance(serves, Stays) and serves.by_choice:
        _demand(_equal(p.materialize(), u), f"at says {serves.reason!r}, but S(u) is not u", where)
    again, _ = sparsifier.apply(u, state)
    _demand(
        _equal(p.materialize(), again.materialize()), "the same input gave another result: draw from the state", where
    )


def _check_under_transformations(sparsifier: Sparsifier, u: jax.Array) -> None:
    state = sparsifier.init(jax.ShapeDtypeStruct(u.shape, u.dtype))

    def apply(u: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        p, after = sparsifier.apply(u, state)
        return p.materialize(), after

    eager = apply(u, state)
    _demand(_alike(jax.jit(apply)(u, state), eager), "jit changes the result", sparsifier.name)
    both, batched = jnp.stack([u, -2 * u]), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    mapped = jax.vmap(apply)(both, batched)
    for i in range(2):
        alone = apply(both[i], state)
        _demand(_alike(jax.tree.map(lambda a, i=i: a[i], mapped), alone), "vmap changes the result", sparsifier.name)
    last, outputs = jax.lax.scan(lambda s, u: apply(u, s)[::-1], state, both)
    first, middle = apply(both[0], state)
    second, end = apply(both[1], middle)
    _demand(_alike((outputs, last), (jnp.stack([first, second]), end)), "scan changes the result", sparsifier.name)


def _check_unbiased(sparsifier: Sparsifier, u: jax.Array) -> None:
    state = sparsifier.init(jax.ShapeDtypeStruct(u.shape, u.dtype))

    def draw(state: Any, _: None) -> tuple[Any, jax.Array]:
        p, state = sparsifier.apply(u, state)
        return state, p.materialize()

    draws = np.asarray(jax.lax.scan(draw, state, None, length=_DRAWS)[1], np.float64)
    error = np.abs(draws.mean(0) - np.asarray(u, np.float64))
    # Bernstein's inequality: what is seldom kept, and then counts much, may not have come at all.
    seldom = _STANDARD_ERRORS**2 / 3 * np.abs(draws).max() / _DRAWS if draws.std(0).any() else 0
    allowed = _STANDARD_ERRORS * draws.std(0) / _DRAWS**0.5 + seldom + 1e-6 * np.abs(np.asarray(u))
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    _demand(
        bool((error <= allowed).all()),
        f"the mean of {_DRAWS} draws is off by {error[worst]:.3g} at {worst}, at most {allowed[worst]:.3g} expected",
        sparsifier.name,
    )


def _best_columns(u: jax.Array | np.ndarray, k: int, group: int | None) -> np.ndarray:
    size = u.shape[0] if group is None else group
    magnitude = np.abs(np.asarray(u, np.float32))
    scores = [magnitude[i : i + size].sum(0) for i in range(0, len(magnitude), size)]
    return np.stack([np.sort(np.argsort(-score, kind="stable")[:k]) for score in scores])


def _types(tree: Any) -> tuple[Any, list[Any]]:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _plain(leaf: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)


def _alike(a: Any, b: Any) -> bool:
    return all(_close(_plain(x), _plain(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _close(a: Any, b: Any) -> bool:
    """Whether two arrays agree up to the rounding of a float32 sum, relative to the largest entry."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and bool((np.abs(a - b) <= 1e-5 * max(1e-30, float(np.abs(b).max(initial=0)))).all())


def _demand(holds: bool, what: str, where: str) -> None:
    if not holds:
        raise AssertionError(f"{where}: {what}. The contract is in the documentation of msbp_jax.Sparsifier.")
