"""Whole steps that the cost model was not fitted to: how many times faster than dense they are, and were said to be.

The model is that of `msbp_jax/kernels/choice/costs`, fitted to `step costs`. A test holds what it says now to what was
measured here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import CNN, LSTM, MLP, Transformer, loss_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, training
from benchmarks.suite.context import Context
from msbp_jax.transform._estimate import StepEstimate, estimate_step, with_update
from msbp_jax.transform._mixes import find_mixing
from msbp_jax.transform._plan import make_plan
from msbp_jax.transform._program import Program, trace
from msbp_jax.transform._shares import find_shares

type Method = msbp.Sparsifier | Mapping[str, msbp.Sparsifier]


class Residual(nn.Module):
    """A stem and three blocks of two convolutions, as in a ResNet; the second and the third halve the image.

    Attributes:
      norm: Whether there is batch norm.
      channels: Of each block.
    """

    norm: bool
    channels: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        norm = lambda x: nn.BatchNorm(use_running_average=False)(x) if self.norm else x
        conv = lambda width, size, stride: nn.Conv(width, (size, size), (stride, stride), use_bias=not self.norm)
        x = nn.relu(norm(conv(self.channels[0], 3, 1)(x)))
        for at, width in enumerate(self.channels):
            stride = 1 if at == 0 else 2
            y = norm(conv(width, 3, 1)(nn.relu(norm(conv(width, 3, stride)(x)))))
            x = nn.relu(y + (x if x.shape == y.shape else norm(conv(width, 1, stride)(x))))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class Network(NamedTuple):
    """A network, a batch and an optimizer.

    Attributes:
      module: The network.
      x: Shape of the inputs; of tokens `(sequences, length)`.
      tokens: How many there are; 0 for inputs that are numbers.
      optimizer: Its name.
    """

    module: nn.Module
    x: tuple[int, ...]
    tokens: int = 0
    optimizer: str = "momentum"


NETWORKS = {
    "MLP 784-(256 x 2)-10, batch 64": Network(MLP(256, 3), (64, 784)),
    "MLP 784-(512 x 3)-10, batch 128": Network(MLP(512, 4), (128, 784), optimizer="Adam"),
    "MLP 784-(1024 x 2)-10, batch 1024": Network(MLP(1024, 3), (1024, 784)),
    "MLP 784-(2048 x 2)-10, batch 512": Network(MLP(2048, 3), (512, 784), optimizer="Adam"),
    "LSTM 128, 32 x 24 tokens": Network(LSTM(64, 128), (32, 24), 64),
    "LSTM 256, 64 x 32 tokens": Network(LSTM(128, 256), (64, 32), 128, "Adam"),
    "transformer 2 x 128, 16 x 48 tokens": Network(Transformer(96, 128), (16, 48), 96),
    "transformer 2 x 256, 16 x 64 tokens": Network(Transformer(128, 256), (16, 64), 128, "Adam"),
    "CNN 32-64-128, 32 images of 32 x 32": Network(CNN(32), (32, 32, 32, 3)),
    "residual 32-64-128, 32 images of 16 x 16": Network(Residual(False), (32, 16, 16, 3)),
    "residual 64-128-256, 16 images of 16 x 16": Network(Residual(False, (64, 128, 256)), (16, 16, 16, 3)),
    "residual 32-64-128, batch norm, 32 images of 16 x 16": Network(Residual(True), (32, 16, 16, 3)),
}
MIN_FEATURES = 64  # as in sparse_vjp
SMALL = {"MLP 784-64-10, batch 8": Network(MLP(64, 2), (8, 784))}
OPTIMIZERS = {"momentum": optax.sgd(0.01, momentum=0.9), "Adam": optax.adam(1e-3)}


def methods() -> dict[str, Method]:
    """Return what is measured of each network."""
    top_k, memorized = msbp.top_k, msbp.memorized
    return {
        "top-k 4 %, r=1": top_k(density=0.04),
        "top-k 4 %, r=32": top_k(density=0.04, rows_per_group=32),
        "top-k 25 %, r=32": top_k(density=0.25, rows_per_group=32),
        "top-k 10 %, all": top_k(density=0.1, rows_per_group=None),
        "MSBP 4 %, r=1": memorized(top_k(density=0.04), decay=0.8),
        "MSBP 10 %, r=32": memorized(top_k(density=0.1, rows_per_group=32), decay=0.8),
        "rows 25 %": msbp.sample_rows(density=0.25),
    }


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each network and method, the dense step over the sparse one, and what was predicted."""
    for name, network in (SMALL if context.small else NETWORKS).items():
        x, y = batch(network)
        variables = network.module.init(jax.random.key(1), x)
        calls: dict[str, Timed] = {"dense": _step(network, None, variables, x, y)}
        calls |= {method: _step(network, sparsifier, variables, x, y) for method, sparsifier in methods().items()}
        ms = medians(calls, context.rounds)
        for method in methods():
            told = predicted(name, method, context.small)
            measured = ms["dense"] / ms[method]
            yield {
                "network": name,
                "optimizer": network.optimizer,
                "method": method,
                "dense_ms": round(ms["dense"], 3),
                "sparse_ms": round(ms[method], 3),
                "dense/sparse": round(measured, 3),
                "predicted dense_ms": round(1e3 * told.plain, 3),
                "predicted": round(told.speed_up, 3),
                "predicted/measured": round(told.speed_up / measured, 2),
            }


def predicted(name: str, method: str, small: bool = False) -> StepEstimate:
    """Return what the model says of a network and a method."""
    network = (SMALL if small else NETWORKS)[name]
    traced = program(network, methods()[method])
    # As a report has it: below batch norm no row is left out.
    shares = find_shares(traced, None, None, find_mixing(traced).mixed)
    params = traced.arguments[: len(traced.parameters)]
    return with_update(estimate_step(traced, share=shares.by_site), OPTIMIZERS[network.optimizer], params)


def program(network: Network, method: Method) -> Program:
    """Return a network's call under a method, of shapes alone."""
    x, variables = _shapes(network)

    def apply(params: Any, others: Any, x: jax.Array) -> Any:
        return network.module.apply({"params": params, **others}, x, mutable=list(others))

    others = {name: of for name, of in variables.items() if name != "params"}
    plan = make_plan(method, MIN_FEATURES)
    return trace(apply, plan, None, variables["params"], (others, x), {}, states=1, first_is_output=True)


@functools.cache
def _shapes(network: Network) -> tuple[Any, Any]:
    x, _ = jax.eval_shape(lambda: batch(network))
    return x, jax.eval_shape(lambda x: network.module.init(jax.random.key(1), x), x)


def batch(network: Network) -> tuple[jax.Array, jax.Array]:
    """Return inputs and labels."""
    keys = jax.random.split(jax.random.key(0))
    if network.tokens:
        drawn = jax.random.randint(keys[0], (network.x[0], network.x[1] + 1), 0, network.tokens)
        return drawn[:, :-1], drawn[:, 1:]
    return jax.random.normal(keys[0], network.x), jax.random.randint(keys[1], network.x[:1], 0, 10)


def _step(network: Network, method: Method | None, variables: Any, x: jax.Array, y: jax.Array) -> Timed:
    tx, params = OPTIMIZERS[network.optimizer], variables["params"]
    others = {name: of for name, of in variables.items() if name != "params"}
    model: Any = network.module if method is None else msbp.sparse_vjp(network.module, method)
    memory = {} if method is None else model.init_memory(variables, x, mutable=list(others))

    def loss(params: Any, memory: Any, others: Any, x: jax.Array, y: jax.Array) -> Any:
        options = {} if method is None else {"memory": memory}
        logits, changed = model.apply({"params": params, **others}, x, mutable=list(others), **options)
        return loss_of(logits, y), changed

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, memory, others, opt_state = state
        if method is None:
            (value, others), grads = jax.value_and_grad(loss, has_aux=True)(params, memory, others, x, y)
        else:
            (value, others), grads, memory = msbp.value_and_grad(loss, has_aux=True)(params, memory, others, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, others, opt_state), value

    return training(step, (params, memory, others, tx.init(params)), x, y)
