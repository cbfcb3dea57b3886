"""A weight used several times in a step: one memory for all uses, or one for each? Accuracy of tagging, EWT.

Time steps: an LSTM under `lax.scan` has one memory, the mean over steps ("one"); given a copy of its weights for each
step it has a memory for each ("each"). Tied layers: one block applied three times, as a scan ("one") or written out,
so that each use has a memory of its own ("each").

python -m studies repeated_sites --data FOLDER --out benchmarks/results/repeated_sites.json
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import msbp_jax as msbp
from benchmarks.data import tagging

EMBED, USES = 64, 3
DENSITY, DECAY = 0.04, 0.8


def lstm(p: dict[str, jax.Array], x: jax.Array, steps: str) -> jax.Array:
    """Return the outputs `[time, batch, hidden]` of an LSTM over `[time, batch, features]`."""
    start = jnp.zeros((2, x.shape[1], len(p["bias"]) // 4))

    def cell(state: jax.Array, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, c = state
        i, f, g, o = jnp.split(jnp.concatenate([x, h], axis=-1) @ w + p["bias"][None], 4, axis=-1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return jnp.stack([h, c]), h

    if steps == "one":
        return lax.scan(lambda s, x: cell(s, x, p["w"]), start, x)[1]
    copies = jnp.broadcast_to(p["w"], (len(x), *p["w"].shape))
    return lax.scan(lambda s, xw: cell(s, *xw), start, (x, copies))[1]


def tagger(p: dict[str, Any], words: jax.Array, suffixes: jax.Array, steps: str, tied: str) -> jax.Array:
    """Return logits `[batch, time, tags]`."""
    x = jnp.concatenate([p["embed"][words], p["embed"][suffixes]], axis=-1).swapaxes(0, 1)
    forward, backward = lstm(p["forward"], x, steps), lstm(p["backward"], x[::-1], steps)[::-1]
    h = jnp.concatenate([forward, backward], axis=-1)
    block = lambda h: h + jnp.tanh(h @ p["block"])
    if tied == "one":
        h, _ = lax.scan(lambda h, _: (block(h), None), h, None, length=USES)
    elif tied == "each":
        h = block(block(block(h)))
    return (h @ p["out"]).swapaxes(0, 1)


def init(key: jax.Array, vocabulary: int, tags: int, hidden: int) -> dict[str, Any]:
    """Return parameters."""
    keys = jax.random.split(key, 5)
    wide = lambda key, m, n: jax.random.normal(key, (m, n)) / m**0.5
    recurrent = [{"w": wide(k, 2 * EMBED + hidden, 4 * hidden), "bias": jnp.zeros(4 * hidden)} for k in keys[:2]]
    return {
        "embed": 0.1 * jax.random.normal(keys[2], (vocabulary, EMBED)),
        "forward": recurrent[0],
        "backward": recurrent[1],
        "block": 0.5 * wide(keys[3], 2 * hidden, 2 * hidden),
        "out": wide(keys[4], 2 * hidden, tags),
    }


def accuracy(f: msbp.SparseFunction, data: tagging.Tagging, hidden: int, count: int, seed: int) -> float:
    """Train for `count` steps and return the accuracy over the words of the test set, in percent."""
    train, test = data.train, data.test
    params = init(jax.random.key(seed), data.vocabulary, data.tags, hidden)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, count))
    first = {name: rows[:64] for name, rows in train.items()}

    def loss_fn(params: Any, memory: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits = f(params, batch["words"], batch["suffixes"], memory=memory)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tags"])
        return jnp.where(batch["tags"] > 0, losses, 0.0).sum() / (batch["tags"] > 0).sum()

    memory = f.init_memory(params, first["words"], first["suffixes"])
    state = msbp.TrainState.create(apply_fn=f, params=params, tx=tx, memory=memory)
    step = msbp.train_step(loss_fn)
    draw = np.random.default_rng(seed)
    for _ in range(count):
        rows = draw.choice(len(train["words"]), 64, replace=False)
        state, _ = step(state, {name: array[rows] for name, array in train.items()})
    predict = jax.jit(lambda p, words, suffixes: f(p, words, suffixes).argmax(-1))
    right = np.asarray(predict(state.params, test["words"], test["suffixes"])) == test["tags"]
    return 100 * float(right[test["tags"] > 0].mean())


def variants() -> dict[str, tuple[Any, str, str]]:
    """Return, by name, the plan, whether time steps share a memory, and whether the layers do."""
    top_k = msbp.top_k(density=DENSITY)
    memorized = msbp.memorized(top_k, decay=DECAY)
    only_lstm = lambda s: dict.fromkeys(("forward/*", "backward/*"), s)
    return {
        "time steps: dense": (msbp.dense(), "one", ""),
        "time steps: top-k": (only_lstm(top_k), "one", ""),
        "time steps: MSBP, one memory": (only_lstm(memorized), "one", ""),
        "time steps: MSBP, one for each step": (only_lstm(memorized), "each", ""),
        "tied: dense": (msbp.dense(), "one", "one"),
        "tied: top-k": ({"block": top_k}, "one", "one"),
        "tied: MSBP, one memory": ({"block": memorized}, "one", "one"),
        "tied: MSBP, one for each use": ({"block": memorized}, "one", "each"),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this study can be told."""
    parser.add_argument("--data", type=pathlib.Path, help="folder with EWT; made-up sentences without it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128, help="units of the LSTM in each direction")
    parser.add_argument("--length", type=int, default=32, help="words of a sentence")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train every variant with every seed; yield the table so far after each."""
    data = tagging.load(args.data, args.length)
    table = {}
    for name, (plan, steps, tied) in variants().items():
        f = msbp.sparse_vjp(functools.partial(tagger, steps=steps, tied=tied), plan)
        found = [accuracy(f, data, args.hidden, args.steps, seed) for seed in range(args.seeds)]
        table[name] = {"mean": round(float(np.mean(found)), 2), "seeds": [round(value, 2) for value in found]}
        print(name, table[name], flush=True)
        yield {"steps": args.steps, "variants": table}
