"""What networks with sparse weights reach, and in what time, beside dense ones: from scratch, and after pruning.

scratch    an MLP on MNIST, dense and with a random pattern that stays (Erdos-Renyi), by SGD with momentum; with
           --longer 2 also twice as many epochs of the sparse ones, which are shorter
nerva      3072-1024-512-10 on the pixels of CIFAR-10, batch 100, the same, at several densities; images are
           shifted by up to four pixels and mirrored, anew in every epoch
transfer   MLPs trained dense on classes 0 to 4 of MNIST, and of CIFAR-10; then on 5 to 9: all of it, and what pruning
           leaves

For each: accuracy after every epoch, seconds of training (compiling apart, tests apart), bytes of parameters and state.
Networks take turns, epoch by epoch.

python -m studies sparse_weights --data FOLDER --parts scratch --epochs 20 --seeds 3
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.data import cifar, mnist
from benchmarks.data.images import Images
from benchmarks.helpers import machine
from benchmarks.helpers.networks import MLP, NERVA

PARTS = ("scratch", "nerva", "transfer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this study can be told."""
    parser.add_argument(
        "--data", type=pathlib.Path, help="folder with MNIST and CIFAR-10; scikit-learn's digits without it"
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--longer", type=int, default=1, help="how many times the epochs, from scratch, sparse")
    parser.add_argument(
        "--rate", type=float, help="of learning from scratch; 0.1 on MNIST and 0.01 on CIFAR-10 if not said"
    )
    parser.add_argument("--width", type=int, default=1024, help="of the MLPs on MNIST")
    parser.add_argument(
        "--densities", type=float, nargs="*", help="0.1 from scratch, .1 .05 .01 for nerva, .05 in transfer"
    )


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train everything seed by seed; yield the result so far after each."""
    result: dict[str, Any] = {"machine": machine.describe("not used"), "runs": []}
    result["setting"] = {key: value for key, value in vars(args).items() if isinstance(value, int | float | list)}
    for part in args.parts:
        for seed in range(args.seeds):
            for found in _PARTS[part](args, seed):
                result["runs"].append({"part": part, "seed": seed, **found})
            yield result


class Network(NamedTuple):
    """Variables, the function that computes with them, and what trains them."""

    params: Any
    patterns: Any
    apply: Callable[[Any, Any, jax.Array], jax.Array]


def dense(module: nn.Module, params: Any) -> Network:
    """Return a network with dense weights."""
    return Network(params, {}, lambda params, _, x: jnp.asarray(module.apply({"params": params}, x)))


def pruned(module: nn.Module, params: Any, density: float, **options: Any) -> Network:
    """Return a network with sparse weights, but for its last layer."""
    last = max(params, key=lambda name: int(name.split("_")[-1]))
    include = [f"{name}/kernel" for name in params if name != last]
    variables = msbp.prune({"params": params}, density=density, include=include, **options)
    model = msbp.sparse_weights(module)
    apply = lambda params, patterns, x: model.apply({"params": params, "sparsity": patterns}, x)
    return Network(variables["params"], variables["sparsity"], apply)


class Training(NamedTuple):
    """How networks are trained: an optimizer for a number of steps, and examples of a step."""

    tx: Callable[[int], optax.GradientTransformation]
    batch: int
    varied: Callable[[np.ndarray, np.random.Generator], np.ndarray] = lambda x, draw: x  # images, anew in every epoch


def trained(
    networks: dict[str, Network], images: Images, how: Training, epochs: int | dict[str, int], seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train networks in turn, epoch by epoch; return what they reach, and their parameters."""
    many = epochs if isinstance(epochs, dict) else dict.fromkeys(networks, epochs)
    steps = len(images.train_y) // how.batch
    runs = {name: _Run(network, images, how.tx(steps * many[name]), how.batch) for name, network in networks.items()}
    for epoch in range(max(many.values())):
        draw = np.random.default_rng((seed, epoch))
        order, x = draw.permutation(len(images.train_y)), jnp.asarray(how.varied(images.train_x, draw))
        for name, one in runs.items():
            if epoch >= many[name]:
                continue
            one.epoch(x, order)
            print(
                f"{images.name}, epoch {epoch + 1}, {name}: {one.accuracy[-1]:.2f} %, {one.seconds[-1]:.1f} s",
                flush=True,
            )
    first = next(iter(runs.values()))
    found = [
        {
            "network": name,
            "accuracy": one.accuracy,
            "seconds": one.seconds,
            "faster": round(first.seconds[-1] / one.seconds[-1], 2),
            "bytes": one.bytes,
        }
        for name, one in runs.items()
    ]
    return found, {name: one.state[0] for name, one in runs.items()}


class _Run:
    """The training of one network."""

    def __init__(self, network: Network, images: Images, tx: optax.GradientTransformation, batch: int) -> None:
        y = jnp.asarray(images.train_y)
        test = jnp.asarray(images.test_x), jnp.asarray(images.test_y)
        self.batch, self.patterns = batch, network.patterns

        def step(state: Any, patterns: Any, x: jax.Array, rows: jax.Array) -> Any:
            params, opt_state = state

            def loss(params: Any) -> jax.Array:
                logits = network.apply(params, patterns, x[rows])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def epoch(state: Any, patterns: Any, x: jax.Array, order: jax.Array) -> Any:
            return jax.lax.scan(lambda state, rows: (step(state, patterns, x, rows), None), state, order)[0]

        self.state = jax.tree.map(jnp.copy, (network.params, tx.init(network.params)))
        steps = len(images.train_y) // batch
        rows = jax.ShapeDtypeStruct((steps, batch), jnp.int32)
        x = jax.ShapeDtypeStruct(images.train_x.shape, jnp.float32)
        self._epoch = jax.jit(epoch, donate_argnums=0).lower(self.state, self.patterns, x, rows).compile()
        self._right = jax.jit(lambda p, s: (network.apply(p, s, test[0]).argmax(-1) == test[1]).mean())
        size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        self.bytes = {"parameters and state": size(self.state), "patterns": size(self.patterns)}
        self.accuracy: list[float] = []
        self.seconds: list[float] = []

    def epoch(self, x: jax.Array, order: np.ndarray) -> None:
        """Train for an epoch and write down where that leads."""
        steps = len(order) // self.batch
        rows = jnp.asarray(order[: steps * self.batch].reshape(steps, self.batch), jnp.int32)
        begun = time.perf_counter()
        self.state = jax.block_until_ready(self._epoch(self.state, self.patterns, x, rows))
        passed = time.perf_counter() - begun
        self.seconds.append(round((self.seconds[-1] if self.seconds else 0.0) + passed, 3))
        self.accuracy.append(round(100 * float(self._right(self.state[0], self.patterns)), 3))


def _of(images: Images, classes: range) -> Images:
    """Return the images of some classes."""
    parts = (images.train_x, images.train_y), (images.test_x, images.test_y)
    kept = [(x[among], y[among]) for x, y in parts for among in [np.isin(y, list(classes))]]
    train, test = kept
    return Images(f"{images.name}, {classes.start} to {classes.stop - 1}", *train, *test)


def _scratch(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    images, module = mnist.load(args.data), MLP(args.width, 3)
    params = module.init(jax.random.key(seed), jnp.asarray(images.train_x[:1]))["params"]
    networks, epochs = {"dense": dense(module, params)}, {"dense": args.epochs}
    for density in args.densities or [0.1]:
        for longer in sorted({1, args.longer}):
            name = f"density {density:g}" + (f", {longer} x the epochs" if longer > 1 else "")
            networks[name], epochs[name] = _random(module, params, density, seed), longer * args.epochs
    return trained(networks, images, _decayed(args.rate or 0.1, 128), epochs, seed)[0]


def _nerva(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    images = mnist.load(None) if args.data is None else _flat(cifar.centred(args.data))
    module = NERVA
    params = module.init(jax.random.key(seed), jnp.asarray(images.train_x[:1]))["params"]
    networks = {"dense": dense(module, params)}
    for density in args.densities or [0.1, 0.05, 0.01]:
        networks[f"density {density:g}"] = _random(module, params, density, seed)
    how = _decayed(args.rate or 0.01, 100)
    return trained(networks, images, how if args.data is None else how._replace(varied=cifar.moved), args.epochs, seed)[
        0
    ]


def _transfer(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    found = _transferred(args, seed, mnist.load(args.data), MLP(args.width, 3), 0.05)
    if args.data is None:
        return found
    return found + _transferred(args, seed, _flat(cifar.centred(args.data)), NERVA, 0.01)


def _transferred(
    args: argparse.Namespace, seed: int, images: Images, module: nn.Module, rate: float
) -> list[dict[str, Any]]:
    before, after = _of(images, range(5)), _of(images, range(5, 10))
    params = module.init(jax.random.key(seed), jnp.asarray(images.train_x[:1]))["params"]
    how = Training(lambda _: optax.sgd(rate, momentum=0.9), 128)
    first, ended = trained({"dense": dense(module, params)}, before, how, args.epochs, seed)
    start = ended["dense"]
    networks = {"dense": dense(module, start)}
    for density in args.densities or [0.05]:
        networks[f"density {density:g}"] = pruned(module, start, density, scope="global")
    then = trained(networks, after, how, args.epochs, seed)[0]
    return [{"data": one.name, **run} for one, runs in ((before, first), (after, then)) for run in runs]


def _decayed(rate: float, batch: int) -> Training:
    return Training(lambda steps: optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9), batch)


def _random(module: nn.Module, params: Any, density: float, seed: int) -> Network:
    """Return a network with a random pattern, its weights scaled up to what the fewer inputs need."""
    key = jax.random.fold_in(jax.random.key(7), seed)
    network = pruned(module, params, density, method="random", scope="erdos_renyi", key=key)
    for name, pattern in network.patterns.items():
        values = network.params[name]["kernel"]
        network.params[name] = {**network.params[name], "kernel": values / pattern["kernel"].density ** 0.5}
    return network


def _flat(images: Images) -> Images:
    return images._replace(
        train_x=images.train_x.reshape(len(images.train_x), -1), test_x=images.test_x.reshape(len(images.test_x), -1)
    )


_PARTS: dict[str, Callable[[argparse.Namespace, int], list[dict[str, Any]]]] = {
    "scratch": _scratch,
    "nerva": _nerva,
    "transfer": _transfer,
}
