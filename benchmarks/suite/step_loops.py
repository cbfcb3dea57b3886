"""Pieces of steps without contractions: activations, norms, losses, pooling, embeddings, cells of a recurrent layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

type Function = Callable[..., Any]


def pieces() -> dict[str, tuple[Function, tuple[Any, ...]]]:
    """Return functions and arguments by name; of most, forward and backward together."""
    out: dict[str, tuple[Function, tuple[Any, ...]]] = {"nothing": (lambda x: x + 1, (jnp.ones(1),))}
    for rows, n in ((16, 16), (64, 1024), (128, 512), (1024, 256), (1024, 1024), (2048, 2048)):
        name, x, b = f"{rows}x{n}", _normal(rows, n), jnp.ones(n)
        out[f"bias and relu {name}"] = (_both(lambda x, b: nn.relu(x + b)), (x, b, x))
        out[f"bias and gelu {name}"] = (_both(lambda x, b: nn.gelu(x + b)), (x, b, x))
        out[f"layer norm {name}"] = (_both(_layer_norm), (x, b, x))
        out[f"sum of columns {name}"] = (lambda x: x.sum(axis=0), (x,))
    for rows, classes in ((128, 10), (1024, 10), (1024, 128), (2048, 256)):
        labels = jnp.zeros(rows, jnp.int32)
        out[f"loss {rows}x{classes}"] = (functools.partial(_loss, labels), (_normal(rows, classes),))
    for batch, heads, length in ((16, 4, 64), (8, 4, 128)):
        out[f"attention {batch}x{heads}x{length}"] = (
            _both(_masked_softmax),
            (*[_normal(batch, heads, length, length)] * 2,),
        )
    for batch, size, channels in ((16, 32, 16), (32, 16, 64), (128, 16, 64)):
        name, x, b = f"{batch}x{size}x{channels}", _normal(batch, size, size, channels), jnp.ones(channels)
        out[f"batch norm and relu {name}"] = (_both(_batch_norm), (x, b, x))
        out[f"residual {name}"] = (_both(lambda x, b: nn.relu(x + x * b)), (x, b, x))
        small = x[:, ::2, ::2]
        out[f"average pooling {name}"] = (_both(lambda x: nn.avg_pool(x, (2, 2), (2, 2))), (x, small))
        out[f"largest pooling {name}"] = (_both(lambda x: nn.max_pool(x, (2, 2), (2, 2))), (x, small))
        out[f"mean of images {name}"] = (_both(lambda x: x.mean(axis=(1, 2))), (x, x[:, 0, 0]))
    for tokens, width in ((1024, 128), (1024, 256), (4096, 64)):
        at = jnp.asarray(np.random.default_rng(0).integers(0, 128, tokens))
        out[f"embedding {tokens}x{width}"] = (
            _both(functools.partial(_embed, at)),
            (_normal(128, width), _normal(tokens, width)),
        )
    for length, batch, width in ((16, 32, 128), (32, 64, 256)):
        gates = _normal(length, batch, 4 * width)
        out[f"cells {length}x{batch}x{width}"] = (_both(_cells), (gates, gates[:, :, :width]))
    small = jnp.arange(64.0)
    out["sort"] = (jnp.sort, (small,))
    out["sums"] = (jnp.cumsum, (small,))
    out["places"] = (lambda x: x.at[x.astype(jnp.int32)].set(2 * x), (small,))
    out["gathered"] = (lambda x: jnp.take(x, x.astype(jnp.int32)), (small,))
    out["drawn"] = (jax.random.split, (jax.random.key(0),))
    out["one behind the other"] = (_one_behind_the_other, (small,))
    for shape in ((256, 1024), (2048, 512)):
        out[f"dropout {shape[0]}x{shape[1]}"] = (_dropped, (_normal(*shape), jax.random.key(0)))
        out[f"turned and joined {shape[0]}x{shape[1]}"] = (_joined, (_normal(*shape),))
    return out


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def _both(function: Function) -> Function:
    """Return a function of (arguments, gradient of the result) that returns the result and all gradients."""

    def run(*arguments: Any) -> Any:
        result, back = jax.vjp(function, *arguments[:-1])
        return result, back(arguments[-1])

    return run


def _layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean = x.mean(axis=-1, keepdims=True)
    spread = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
    return (x - mean) * jax.lax.rsqrt(spread + 1e-6) * scale


def _batch_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean = x.mean(axis=(0, 1, 2))
    spread = jnp.square(x).mean(axis=(0, 1, 2)) - jnp.square(mean)
    return nn.relu((x - mean) * jax.lax.rsqrt(spread + 1e-5) * scale)


def _loss(labels: jax.Array, logits: jax.Array) -> Any:
    def loss(logits: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1).mean()

    return jax.value_and_grad(loss)(logits)


def _masked_softmax(scores: jax.Array) -> jax.Array:
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen, scores / 8, -1e9))


def _embed(at: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.take(table, at, axis=0)


def _cells(gates: jax.Array) -> jax.Array:
    width = gates.shape[-1] // 4

    def cell(carry: Any, gates: jax.Array) -> Any:
        state, shown = carry
        mixed = gates + jnp.tile(shown, 4)
        i, f, o = (nn.sigmoid(mixed[:, part * width : (part + 1) * width]) for part in range(3))
        state = f * state + i * jnp.tanh(mixed[:, 3 * width :])
        shown = o * jnp.tanh(state)
        return (state, shown), shown

    start = jnp.zeros((gates.shape[1], width))
    return jax.lax.scan(cell, (start, start), gates)[1]


def _one_behind_the_other(x: jax.Array) -> jax.Array:
    for _ in range(8):
        x = jnp.concatenate([x[32:], x[:32]]) - x.sum()
    return x


def _dropped(x: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


def _joined(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x.T[: len(x) // 8], 2 * x.T[: len(x) // 8]], axis=-1)
