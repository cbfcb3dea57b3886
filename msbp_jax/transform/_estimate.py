"""What a whole training step is expected to take, dense and sparse, so that a report can say whether sparsity pays.

The program and its gradient are traced, their equations counted as work of a few kinds, and each unit of work has the
seconds that it was measured to take (`kernels/choice/costs`). What a step takes is the sum: nothing is run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msbp_jax import _compat
from msbp_jax.kernels.choice.costs.coefficients import seconds
from msbp_jax.kernels.choice.costs.optimizers import work_of_update
from msbp_jax.kernels.choice.costs.work import Work, work_of_run
from msbp_jax.rules._work import Use, dense_work, entering_work, forward_work, sparse_work
from msbp_jax.transform._discover import Place
from msbp_jax.transform._gradients import needed_gradients
from msbp_jax.transform._program import Program
from msbp_jax.transform._sites import Site

_NOT_RUN = "which is not run here"  # in a branch for another platform


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerEstimate:
    """The backward of a contraction with a parameter, all its uses in a step together.

    Attributes:
      name: Path of its parameter; "@outputs" for what is chosen where the gradient enters, which has no dense side.
      dense: Seconds as plain JAX has it.
      sparse: Seconds under the plan; `dense` where it stays so.
    """

    name: str
    dense: float
    sparse: float

    @property
    def speed_up(self) -> float:
        """How many times faster than dense."""
        return self.dense / self.sparse if self.sparse > 0 else 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """A training step by its parts, in seconds.

    Attributes:
      forward: All contractions of the forward.
      rest: Everything else of both passes: loops over entries, sums, contractions of data with data.
      optimizer: Its update; 0 if none was given.
      layers: The backward of each contraction with a parameter.
    """

    forward: float
    rest: float
    optimizer: float
    layers: tuple[LayerEstimate, ...]

    @property
    def plain(self) -> float:
        """Seconds of the dense step."""
        return self.forward + self.rest + self.optimizer + sum(layer.dense for layer in self.layers)

    @property
    def sparse(self) -> float:
        """Seconds of the step under the plan."""
        return self.forward + self.rest + self.optimizer + sum(layer.sparse for layer in self.layers)

    @property
    def speed_up(self) -> float:
        """How many times faster than dense the whole step is."""
        return self.plain / self.sparse if self.sparse > 0 else 1.0


def estimate_step(
    program: Program,
    *,
    share: float | Mapping[str, float] | None = None,
) -> StepEstimate:
    """Return what a training step of a program is expected to take, without its optimizer.

    Args:
      program: The traced call of a wrapped model.
      share: The share of rows or entries that is kept by methods that know it only when they run; None for what is
        drawn where the gradient enters, if that is known, and else for all of them. One for each site by its name, too;
        sites without one keep all.

    Raises:
      ValueError: `share` is not in (0, 1], or a weight is sparse.
    """
    by_site = share if isinstance(share, Mapping) else {}
    shares = [*by_site.values()] if isinstance(share, Mapping) else [] if share is None else [share]
    if not all(0 < kept <= 1 for kept in shares):
        raise ValueError(f"share must be in (0, 1], the share of rows or entries that is kept, got {share}.")
    if program.weights:
        named = ", ".join(program.parameters[number][0] for number in program.weights)
        raise ValueError(
            f"There is no model of what a step with sparse weights takes, and {named} is sparse. Estimate the dense "
            "model, wrapped by sparse_vjp alone."
        )
    layers = []
    entering = program.outputs
    if entering is not None and entering.sparsifier is not None and not entering.is_empty:
        drawn, known = entering_work(entering.sparsifier, entering.cotangent)
        layers.append(LayerEstimate(name=entering.name, dense=0.0, sparse=seconds(drawn)))
        share = known if share is None else share
    kept = 1.0 if share is None or isinstance(share, Mapping) else share
    # Layers of one shape are traced once.
    dense_of, forward_of = functools.cache(dense_work), functools.cache(forward_work)
    sparse_of = functools.cache(lambda use, sparsifier, kept: sparse_work(use, sparsifier, program.backend, kept))
    running = [site for site in program.sites if site.operation is not None and _NOT_RUN not in site.found.sealed]
    needed = needed_gradients(program)
    for site in running:
        use = _use(site, needed)
        if not _is_layer(site, use):
            continue
        dense = sparse = seconds(dense_of(use)) * _uses(site)
        if site.sparsifier is not None:
            sparse = seconds(sparse_of(use, site.sparsifier, by_site.get(site.name, kept))) * _uses(site)
        layers.append(LayerEstimate(name=site.name, dense=dense, sparse=sparse))
    forward = sum(seconds(forward_of(_use(site, needed))) * _uses(site) for site in running)
    whole = seconds(_gradient_work(program))
    return StepEstimate(
        forward=forward,
        rest=max(0.0, whole - forward - sum(layer.dense for layer in layers)),
        optimizer=0.0,
        layers=tuple(layers),
    )


def with_update(step: StepEstimate, optimizer: optax.GradientTransformation, params: Any) -> StepEstimate:
    """Return the step with its optimizer's update.

    Args:
      step: The step.
      optimizer: What updates the parameters; only its `init` is called, on shapes.
      params: The parameters, as their user has them: an optimizer may have masks or labels of the same structure.

    Raises:
      ValueError: The optimizer does not take these parameters.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    trained = jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, shapes)  # None is no leaf
    failed: Exception | None = None
    for given in (trained, shapes):  # a mask may have places for what is not trained, too
        try:
            return dataclasses.replace(step, optimizer=seconds(work_of_update(optimizer, given)))
        except Exception as error:  # of the user's own functions, of any kind
            failed = failed or error
    raise ValueError(
        f"optimizer.init must take the parameters of the model, and does not take these "
        f"({str(failed).split(chr(10))[0]}). Pass the optimizer that trains them, with masks or "
        "labels of their structure."
    ) from failed


def _is_layer(site: Site, use: Use) -> bool:
    """Whether a contraction has a backward of its own here: with a parameter, or one that the plan makes sparse."""
    named = site.found.side is not None or site.sparsifier is not None
    return named and not site.is_empty and (use.of_inputs or use.of_weight)


def _use(site: Site, needed: Mapping[Place, tuple[bool, bool]]) -> Use:
    assert site.operation is not None
    found = site.found
    of_lhs, of_rhs = needed.get(found.place, (False, False))
    return Use(
        operation=site.operation,
        side=site.side,
        operands=(found.lhs, found.rhs),
        out=found.out,
        of_inputs=of_rhs if site.side == "lhs" else of_lhs,
        of_weight=of_lhs if site.side == "lhs" else of_rhs,
    )


def _uses(site: Site) -> int:
    """Return how often a contraction runs in a step."""
    return math.prod(loop.length for loop in site.loops)


def _gradient_work(program: Program) -> Work:
    """Return the work of the program and of its plain gradient with respect to its parameters."""
    jaxpr, count = program.jaxpr, len(program.parameters)
    moves = [number < count and _is_floating(aval) for number, aval in enumerate(jaxpr.in_avals)]
    floating = [_is_floating(aval) for aval in jaxpr.out_avals]

    def step(moving: list[Any], fixed: list[Any], gradients: list[Any]) -> Any:
        def run(moving: list[Any]) -> list[Any]:
            these, others = iter(moving), iter(fixed)
            arguments = [next(these) if yes else next(others) for yes in moves]
            results = _compat.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arguments)
            return [result for result, yes in zip(results, floating, strict=True) if yes]

        results, back = jax.vjp(run, moving)
        return results, back(gradients)

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in jaxpr.in_avals]
    moving = [shape for shape, yes in zip(shapes, moves, strict=True) if yes]
    fixed = [shape for shape, yes in zip(shapes, moves, strict=True) if not yes]
    gradients = [
        jax.ShapeDtypeStruct(a.shape, a.dtype) for a, yes in zip(jaxpr.out_avals, floating, strict=True) if yes
    ]
    return work_of_run(_compat.make_jaxpr(step, (moving, fixed, gradients), any_axes=True), within=True)


def _is_floating(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)
