"""Pieces of training steps, one by one, from which the seconds of a unit of work follow.

Each piece is a small program of few kinds of work: products, convolutions, native kernels, loops over entries. With
`--fit`, the coefficients of `msbp_jax/kernels/choice/costs/coefficients.py` are fitted to all of them together
(non-negative least squares of the relative error) and printed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import CNN, LSTM, MLP, NERVA, Setting, Transformer, problem
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed, training
from benchmarks.suite import step_loops
from benchmarks.suite.context import Context
from benchmarks.suite.convolutions import Layer, convolution
from msbp_jax import kernels
from msbp_jax.kernels.choice.costs import optimizers
from msbp_jax.kernels.choice.costs.work import Work, joined, work_of_run
from msbp_jax.rules._patches import Window


class Piece(NamedTuple):
    """A program that is measured.

    Attributes:
      function: What is compiled.
      arguments: Its arrays.
      share: The share of rows or entries that is not 0 among them.
      work: Its work, where that does not follow from its program.
      in_place: Whether its first argument is a state that it gives back renewed.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    share: float = 1.0
    work: Work | None = None
    in_place: bool = False


PRODUCTS = (
    (16, 128, 512),
    (64, 256, 1024),
    (128, 784, 500),
    (128, 500, 10),
    (256, 1024, 256),
    (512, 512, 512),
    (1024, 128, 128),
    (1024, 256, 1024),
    (1024, 1024, 1024),
    (1024, 512, 10),
    (2048, 512, 2048),
)
BATCHED = ((64, 64, 64, 64), (16, 128, 64, 128), (128, 32, 32, 32))  # products, rows, depth, columns
SELECTIONS = (
    (32, 128, 512),
    (64, 256, 1024),
    (128, 784, 500),
    (256, 1024, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 128, 512),
)
KEPT: tuple[tuple[float, int | None], ...] = (
    (0.04, 1),
    (0.1, 1),
    (0.25, 1),
    (0.04, 32),
    (0.1, 32),
    (0.25, 32),
    (0.1, None),
)
CONVOLUTIONS = (
    Layer(32, 32, 3, 16, 3, 1),
    Layer(32, 32, 16, 16, 3, 1),
    Layer(32, 32, 32, 32, 3, 1),
    Layer(64, 28, 1, 32, 3, 1),
    Layer(32, 16, 64, 64, 3, 1),
    Layer(64, 16, 32, 64, 3, 1),
    Layer(32, 8, 128, 128, 3, 1),
    Layer(8, 56, 64, 64, 3, 1),
    Layer(16, 14, 256, 256, 3, 1),
    Layer(32, 16, 32, 64, 3, 2),
    Layer(32, 32, 16, 32, 3, 2),
    Layer(16, 28, 128, 256, 3, 2),
    Layer(32, 20, 32, 64, 4, 2),
    Layer(64, 14, 6, 16, 5, 1),
    Layer(32, 16, 32, 64, 1, 2),
    Layer(8, 28, 64, 256, 1, 1),
    Layer(32, 14, 256, 64, 1, 1),
    Layer(32, 16, 64, 6, 3, 1),
    Layer(32, 8, 6, 128, 3, 1),
)
NETWORKS_COUNT = 3.0  # as much as so many pieces by themselves
SHARES = (1 / 16, 1 / 4, 1 / 2)


def measure(context: Context) -> Iterator[Row]:
    """Yield the time of each piece."""
    for family, pieces in families(context.small).items():
        calls = {name: _call(piece) for name, piece in pieces.items()}
        for name, ms in medians(calls, context.rounds, warm_up=1).items():
            yield {"family": family, "piece": name, "ms": round(ms, 4)}


def _call(piece: Piece) -> Timed:
    if piece.in_place:
        return training(piece.function, *piece.arguments)
    return timed(jax.jit(piece.function), *piece.arguments)


def families(small: bool = False) -> dict[str, dict[str, Piece]]:
    """Return all pieces by their families; a few of each if `small`."""
    made = {
        "products": _products,
        "columns": _columns,
        "rows and entries": _rows_and_entries,
        "convolutions": _convolutions,
        "patches": _patches,
        "loops": _loops,
        "optimizers": _optimizers,
        "networks": _networks,
    }
    if "native" not in kernels.backends()["grad_input"]:
        made = {name: pieces for name, pieces in made.items() if name not in ("columns", "rows and entries")}
    return {name: dict(itertools.islice(pieces(), 2 if small else None)) for name, pieces in made.items()}


def fit(table: list[Row]) -> dict[str, tuple[float, ...]]:
    """Return the seconds of a unit of each kind of work that fit the table best."""
    from scipy.optimize import nnls

    pieces = {(family, name): piece for family, of in families().items() for name, piece in of.items()}
    rows = [(row["ms"] / 1e3, work_of_piece(pieces[row["family"], row["piece"]])) for row in table]
    places = list(
        dict.fromkeys((kind, i) for _, work in rows for kind, units in work.items() for i in range(len(units)))
    )
    units = np.array([[(*work.get(kind, ()), *[0.0] * 9)[i] for kind, i in places] for _, work in rows])
    seconds = np.array([s for s, _ in rows])
    relative = units / seconds[:, None]
    given = np.array([NETWORKS_COUNT if row["family"] == "networks" else 1.0 for row in table])
    weights, scale = np.ones(len(rows)), np.maximum(relative.max(axis=0), 1e-30)
    found = np.zeros(len(places))
    for _ in range(10):  # towards the least absolute error, which outliers pull less
        by = weights * given
        found = nnls(relative / scale * by[:, None], by, maxiter=100000)[0] / scale
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), 0.05))
    out: dict[str, list[float]] = {}
    for (kind, _), value in zip(places, found, strict=True):
        out.setdefault(kind, []).append(float(f"{value:.3g}"))
    return {kind: tuple(out[kind]) for kind in sorted(out)}


def work_of_piece(piece: Piece) -> Work:
    """Return the work of a piece, that of calling a program among it."""
    if piece.work is not None:
        return joined(piece.work, {"program": (1, 0)})
    return work_of_run(jax.make_jaxpr(piece.function)(*piece.arguments), piece.share)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def _products() -> Iterator[tuple[str, Piece]]:
    for rows, m, n in PRODUCTS:
        name, (x, w, g) = f"{rows}x{m}x{n}", (_normal(rows, m), _normal(m, n), _normal(rows, n))
        yield f"y {name}", Piece(jnp.matmul, (x, w))
        yield f"dx {name}", Piece(lambda x, w, g: jax.vjp(lambda x: x @ w, x)[1](g), (x, w, g))
        yield f"dw {name}", Piece(lambda x, w, g: jax.vjp(lambda w: x @ w, w)[1](g), (x, w, g))
    for batch, rows, depth, columns in BATCHED:
        x, w = _normal(batch, rows, depth), _normal(batch, depth, columns)
        yield f"{batch} of {rows}x{depth}x{columns}", Piece(jnp.matmul, (x, w))
        turned = lambda x, w: jnp.einsum("bik,bjk->bij", x, w)  # as scores are made of queries and keys
        yield f"{batch} of {rows}x{depth}x{columns}, turned", Piece(turned, (x, _normal(batch, columns, depth)))


def _columns() -> Iterator[tuple[str, Piece]]:
    for rows, m, n in SELECTIONS:
        x, w, g, memory = _normal(rows, m), _normal(m, n), _normal(rows, n), jnp.zeros(n)
        for density, group in KEPT:
            k, name = max(1, round(density * n)), f"{rows}x{m}x{n}, {density:.0%} r={group}"
            select = functools.partial(kernels.select, k=k, rows_per_group=group)
            yield f"select {name}", Piece(select, (g,))
            remembered = functools.partial(kernels.select_with_memory, k=k, rows_per_group=group)
            yield f"select with memory {name}", Piece(remembered, (g, memory))
            p = select(g)
            yield f"dx {name}", Piece(functools.partial(kernels.grad_input, feature_axis=1, backend="native"), (p, w))
            yield f"dw {name}", Piece(functools.partial(kernels.grad_weight, feature_axis=1, backend="native"), (p, x))


def _rows_and_entries() -> Iterator[tuple[str, Piece]]:
    for rows, m, n in SELECTIONS[:-1]:
        x, w, g = _normal(rows, m), _normal(m, n), _normal(rows, n)
        yield f"dither {rows}x{n}", Piece(_dithered, (g,))
        for share in SHARES:
            draw = np.random.default_rng(0)
            weight = jnp.asarray(draw.permutation(rows) < round(share * rows), jnp.float32)
            entries = msbp.Entries(g * jnp.asarray(draw.random((rows, n)) < share / 2, jnp.float32))
            yield f"live rows {share:.3g} of {rows}x{n}", Piece(kernels.live_rows, (g * weight[:, None],), share)
            for kind, p, kept in (("rows", msbp.Rows(g, 2 * weight), share), ("entries", entries, share / 2)):
                name = f"{kind} {kept:.3g} of {rows}x{m}x{n}"
                dx = functools.partial(kernels.grad_input, feature_axis=1, backend="native")
                dw = functools.partial(kernels.grad_weight, feature_axis=1, backend="native")
                yield f"dx {name}", Piece(dx, (p, w), kept)
                yield f"dw {name}", Piece(dw, (p, x), kept)


def _dithered(g: jax.Array) -> Any:
    return kernels.dither(g, jnp.asarray([1, 2], jnp.uint32), 4 * kernels.spread(g))


def _convolutions() -> Iterator[tuple[str, Piece]]:
    for layer in CONVOLUTIONS:
        name, (x, w, g) = _name(layer), _arrays(layer)
        forward = functools.partial(convolution, layer)
        yield f"y {name}", Piece(forward, (w, x))
        yield f"dx {name}", Piece(lambda w, x, g, f=forward: jax.vjp(lambda x: f(w, x), x)[1](g), (w, x, g))
        yield f"dw {name}", Piece(lambda w, x, g, f=forward: jax.vjp(lambda w: f(w, x), w)[1](g), (w, x, g))
    for batch, size, channels in ((16, 16, 64), (32, 32, 32)):
        name, x, w = (
            f"depthwise {batch}x{size}x{channels}",
            _normal(batch, size, size, channels),
            _normal(3, 3, 1, channels),
        )
        forward = functools.partial(_depthwise, channels)
        yield f"y {name}", Piece(forward, (w, x))
        yield f"dx, dw {name}", Piece(lambda w, x, f=forward: jax.vjp(f, w, x)[1](x), (w, x))


def _depthwise(channels: int, w: jax.Array, x: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=channels)


def _patches() -> Iterator[tuple[str, Piece]]:
    for layer in CONVOLUTIONS[1:12]:
        x, _, g = _arrays(layer)
        lo = max(0, (g.shape[1] - 1) * layer.stride + layer.window - layer.size)
        window = Window(
            size=(layer.window,) * 2,
            strides=(layer.stride,) * 2,
            padding=((lo // 2, lo - lo // 2),) * 2,
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            positions=g.shape[1:3],
        )
        yield f"laid out {_name(layer)}", Piece(window.patches, (x,))
        made = jax.eval_shape(window.patches, x)
        back = lambda x, g, window=window: jax.vjp(window.patches, x)[1](g)[0]
        yield f"added up {_name(layer)}", Piece(back, (x, _normal(*made.shape)))


def _loops() -> Iterator[tuple[str, Piece]]:
    for name, (function, arguments) in step_loops.pieces().items():
        yield name, Piece(function, arguments)
    for rows in (64, 1024):
        drawn = msbp.sample_rows(density=0.25)
        g = _normal(rows, 10)
        yield f"draw of {rows} rows", Piece(drawn.apply, (g, drawn.init(jax.ShapeDtypeStruct(g.shape, g.dtype))))


def _optimizers() -> Iterator[tuple[str, Piece]]:
    for name, tx in (("momentum", optax.sgd(0.1, momentum=0.9)), ("Adam", optax.adam(1e-3)), ("SGD", optax.sgd(0.1))):
        for shapes in (
            [(500, 500), (500,)] * 3,
            [(1024, 1024), (1024,)] * 3,
            [(3, 3, 64, 64), (64,)] * 12,
            [(2048, 2048)],
        ):
            params: Any = {str(i): _normal(*shape) for i, shape in enumerate(shapes)}
            state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)

            def update(state: Any, grads: Any, tx: Any = tx) -> Any:
                params, own = state
                updates, own = tx.update(grads, own, params)
                return (optax.apply_updates(params, updates), own), jnp.zeros(())

            work = optimizers.work_of_update(tx, params)
            yield (
                f"{name} {len(shapes)} of {shapes[0]}",
                Piece(update, ((params, state), grads), 1.0, work, in_place=True),
            )


def _networks() -> Iterator[tuple[str, Piece]]:
    """Return gradients of a few whole networks: side by side, pieces find less in the caches than each by itself."""
    keys = jax.random.split(jax.random.key(0), 2)
    text = lambda sequences, length: jax.random.randint(keys[0], (sequences, length), 0, 64)
    labels = lambda *shape: jax.random.randint(keys[1], shape, 0, 10)
    settings = (
        Setting("MLP 3072-1024-512-10", NERVA, _normal(100, 3072), labels(100), 32),
        Setting("MLP 784-(768 x 2)-10", MLP(768, 3), _normal(256, 784), labels(256), 32),
        Setting("LSTM 192", LSTM(64, 192), text(48, 20), labels(48, 20), 32),
        Setting("transformer 1 x 192", Transformer(64, 192, 1), text(12, 40), labels(12, 40), 32),
        Setting("CNN 24-48-96", CNN(24), _normal(16, 24, 24, 3), labels(16), 32),
    )
    methods: dict[str, msbp.Sparsifier | None] = {
        "dense": None,
        "top-k": msbp.top_k(density=0.04),
        "MSBP": msbp.memorized(msbp.top_k(density=0.1, rows_per_group=32), decay=0.8),
        "all": msbp.top_k(density=0.1, rows_per_group=None),
    }
    for setting in settings:
        for name, sparsifier in methods.items():
            gradients, params, memory = problem(setting, sparsifier)
            yield f"{setting.name}, {name}", Piece(gradients, (params, memory, setting.x, setting.y))


def _name(layer: Layer) -> str:
    return f"{layer.batch}x{layer.size}x{layer.channels_in} -> {layer.channels_out}, {layer.window}/{layer.stride}"


def _arrays(layer: Layer) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = _normal(layer.batch, layer.size, layer.size, layer.channels_in)
    w = _normal(layer.window, layer.window, layer.channels_in, layer.channels_out)
    return x, w, _normal(*jax.eval_shape(functools.partial(convolution, layer), w, x).shape)
