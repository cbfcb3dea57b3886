"""`Subnetwork`: what a step of training by small networks consists of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msbp_jax import _checks
from msbp_jax.subnetworks import _narrow, _structure
from msbp_jax.subnetworks._kept import update_kept
from msbp_jax.subnetworks._memory import places_of_memory
from msbp_jax.subnetworks._model import Models
from msbp_jax.subnetworks._narrow import Chosen, chosen_of
from msbp_jax.subnetworks._sample import Sample, sampled
from msbp_jax.subnetworks._structure import Structure
from msbp_jax.subnetworks._units import Units, check, declared, total
from msbp_jax.training._value_and_grad import check_loss, value_and_grad

type Budget = float | int | Callable[[Any], Any]


class Subnetwork:
    """What trains a network by parts of it; made by `subnetwork`.

    Attributes:
      target: The function or factory.
    """

    def __init__(
        self,
        target: Any,
        units: Any,
        budget: Budget,
        widths: dict[str, int] | None,
        optimizer: optax.GradientTransformation,
        alpha: float,
        ratio: float,
    ) -> None:
        self.target = target
        self._declared = units
        self._budget = budget
        self._is_share = (float(budget(0)) if callable(budget) else budget) <= 1  # a schedule: by where it begins
        self._optimizer = optimizer
        self._alpha = alpha
        self._ratio = ratio
        self._models = Models(target, widths)

    def units(self, params: Any) -> Units:
        """Return the groups of units and their axes; print them."""
        return declared(self._declared, params)

    def init(self, params: Any, *args: Any, **kwargs: Any) -> Structure:
        """Return the structure at the start: all units alike, at the budget.

        Args:
          params: Parameters, or a Linen module's variables.
          *args: Arguments of the model, if it is to be checked that the model runs with fewer units of each group.
          **kwargs: The same.

        Raises:
          ValueError: The budget is above the units, or leaves less than one for each group; units that do not fit the
            parameters, or, with arguments, that are not tied as the model has them.
        """
        units = self.units(params)
        check(units, params)
        count, every = self._number(total(units), 0), total(units)
        if not callable(self._budget) and not len(units) <= count <= every:
            raise ValueError(
                f"A budget of {self._budget} is {float(count):g} units, of {every} in {len(units)} groups: it must "
                "leave at least one for each group, and is at most all of them."
            )
        if args or kwargs:
            self._models.check(units, params, args, kwargs)
        share = jnp.clip(jnp.asarray(count, jnp.float32) / every, 0, 1)
        probabilities = {name: jnp.full(group.size, share, jnp.float32) for name, group in units.items()}
        return Structure(probabilities, self._optimizer.init(probabilities), jnp.zeros((), jnp.int32))

    def sample(self, structure: Structure, key: jax.Array, previous: Sample | None = None) -> Sample:
        """Return two draws of units, in capacities that programs are compiled for.

        Capacities follow the probabilities, and grow where a draw needs more: nothing is cut off. Where no unit of a
        group was drawn, its most probable one is taken; the estimate is that of the loss with this rule. It is called
        outside of `jax.jit`.

        Args:
          structure: The structure.
          key: Typed PRNG key; another one for every step.
          previous: The sample before: its capacities are kept while they are at most one rung too large, so that fewer
            programs are compiled.

        Raises:
          TypeError: Called on traced arrays.
          ValueError: Probabilities are not finite, as after a loss that was not, or not within the budget.
        """
        if any(isinstance(s, jax.core.Tracer) for s in structure.probabilities.values()):
            raise TypeError(
                "sample decides on the sizes of programs: call it outside of jax.jit, and pass its result in."
            )
        every = sum(s.size for s in structure.probabilities.values())
        return sampled(structure, key, float(self._number(every, structure.step)), self._ratio, previous)

    def value_and_grad(
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, weights: str = "first", kept_only: bool = False
    ) -> Callable[..., Any]:
        """Return a function that computes the loss of a sample, and the gradients of weights and structure.

        Args:
          loss_fn: `loss_fn(model, params, *args, **kwargs)`, a real scalar, or `(scalar, aux)`. `model` is a `Narrow`
            and `params` are narrow. Both samples see the same arguments, keys of dropout among them.
          has_aux: Whether `loss_fn` returns something besides the loss; that of the first sample is returned.
          weights: Which samples serve the weights: `"first"`, or `"both"`, at the mean of their losses.
          kept_only: Whether the gradient of the weights stays as narrow as the first sample; else it has the shapes of
            the parameters, and zeros where no unit was drawn.

        Returns:
          A function `(params, structure, sample, *args, **kwargs)` that returns `(loss, grads, structure gradients)`,
          or `((loss, aux), grads, structure gradients)`. jit it: it compiles once for each set of capacities. With a
          keyword `memory=`, that of a model of `sparse_vjp` in full, the loss is `loss_fn(model, params, memory, ...)`,
          whose memory is narrow, and the new one, of the first sample, is returned as a fourth result.

        Raises:
          TypeError: The loss is not a real scalar.
          ValueError: `weights` is neither, or "both" with `kept_only` or a memory.
        """
        if weights not in ("first", "both"):
            raise ValueError(f'weights must be "first" or "both", got {weights!r}.')
        if weights == "both" and kept_only:
            raise ValueError('The gradient of both samples is of the units of either: with weights="both" it is whole.')

        def run(
            params: Any, structure: Structure, sample: Sample, *args: Any, memory: Any = None, **kwargs: Any
        ) -> Any:
            if weights == "both" and memory is not None:
                raise ValueError('A memory is that of the first sample: with weights="both" there is none.')
            units = self.units(params)
            _check_structure(structure, units)
            remembered = None if memory is None else places_of_memory(units, params, memory)

            def of(chosen: Chosen, narrowed: Any, *state: Any) -> tuple[jax.Array, Any]:
                result = loss_fn(self._models.at(units, chosen), narrowed, *state, *args, **kwargs)
                value, aux = result if has_aux else (result, None)
                check_loss(value)
                return jnp.asarray(value), aux

            def state_of(chosen: Chosen) -> list[Any]:
                cut = lambda leaf, where: _narrow.take(leaf, where, chosen)
                return [] if memory is None else [jax.tree.map(cut, memory, remembered)]

            cut_out = lambda chosen: jax.vjp(lambda params: _narrow.narrow(units, params, chosen), params)
            (first_slices, put_first), (second_slices, put_second) = map(cut_out, (sample.first, sample.second))
            gradient = jax.value_and_grad(of, argnums=1, has_aux=True)
            if memory is None:
                (value, aux), grads = gradient(sample.first, first_slices)
            else:
                through = value_and_grad(functools.partial(of, sample.first), has_aux=True)
                (value, aux), grads, after = through(first_slices, *state_of(sample.first))
                put_back = lambda leaf, new, where: _narrow.put(leaf, new, where, sample.first)
                memory = jax.tree.map(put_back, memory, after, remembered)
            if kept_only:
                grads = _narrow.cleared(units, params, grads, sample.first)
            else:
                (grads,) = put_first(grads)
            if weights == "both":
                (other, _), more = gradient(sample.second, second_slices)
                (more,) = put_second(more)
                grads = jax.tree.map(lambda a, b: (a + b) / 2, grads, more)
            else:
                other, _ = of(sample.second, second_slices, *state_of(sample.second))
            first, second = (chosen.masks(units, drawn=True) for chosen in (sample.first, sample.second))
            difference = (value - other).astype(jnp.float32)
            of_structure = _structure.gradient(structure.probabilities, first, second, difference, self._alpha)
            value = (value + other) / 2 if weights == "both" else value
            found = (value, aux) if has_aux else value
            return (found, grads, of_structure) if memory is None else (found, grads, of_structure, memory)

        return run

    def update(self, grads: Any, structure: Structure) -> Structure:
        """Return the structure after a step of its optimizer and the projection onto the budget."""
        updates, opt_state = self._optimizer.update(grads, structure.opt_state, structure.probabilities)
        moved = optax.apply_updates(structure.probabilities, updates)
        step = structure.step + 1
        units = sum(s.size for s in structure.probabilities.values())
        budget = self._number(units, step)
        return Structure(_structure.projected(moved, budget), opt_state, step)

    def update_kept(
        self, tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, chosen: Chosen
    ) -> tuple[Any, Any]:
        """Return `(params, opt_state)` after a step of the weights' optimizer on the units of a sample alone.

        What is read and written is as small as the sample. The momentum of the other units stands still, where
        `tx.update` on the whole gradient would let it decay and move them on.

        Args:
          tx: The user's optimizer, whose state was made of the whole parameters.
          grads: Of `value_and_grad(..., kept_only=True)`.
          opt_state: Its state.
          params: The whole parameters.
          chosen: `sample.first`.
        """
        return update_kept(tx, self.units(params), grads, opt_state, params, chosen)

    def narrow(self, tree: Any, chosen: Chosen, like: Any = None) -> Any:
        """Return a pytree with the slices of a sample; its paths are those of the units.

        Args:
          tree: Parameters, a part of them, or variables.
          chosen: The sample.
          like: Parameters that have all units, if `tree` has not.
        """
        return _narrow.narrow(self.units(tree if like is None else like), tree, chosen)

    def widen(self, tree: Any, narrowed: Any, chosen: Chosen, like: Any = None) -> Any:
        """Return a pytree with the slices of a sample replaced by those that `narrow` returned, changed."""
        return _narrow.widen(self.units(tree if like is None else like), tree, narrowed, chosen)

    def masked(self, tree: Any, chosen: Chosen) -> Any:
        """Return parameters of full size with zeros for all units that are not of a sample."""
        return _narrow.masked(self.units(tree), tree, chosen)

    def best(
        self,
        structure: Structure,
        params: Any,
        key: jax.Array,
        score: Callable[..., Any],
        *args: Any,
        candidates: int = 10,
    ) -> Chosen:
        """Return the best of several draws, without anything that fills up.

        Args:
          structure: The structure at the end of training.
          params: Parameters, or variables.
          key: Typed PRNG key.
          score: `score(model, narrow params, *args)`, a loss on training data: the smallest wins.
          *args: Passed on.
          candidates: How many draws.
        """
        count = _checks.positive_int("candidates", candidates, "draws of which the best is kept")
        units = self.units(params)

        def of(params: Any, chosen: Chosen, *args: Any) -> Any:
            return score(self._models.at(units, chosen), _narrow.narrow(units, params, chosen), *args)

        scored = jax.jit(of)
        samples = [self.sample(structure, k) for k in jax.random.split(key, -(-count // 2))]
        drawn = [chosen for sample in samples for chosen in (sample.first, sample.second)][:count]
        scores = [float(scored(params, chosen, *args)) for chosen in drawn]
        if not np.isfinite(scores).any():
            raise ValueError(f"No candidate has a finite score: {scores}.")
        return self._exact(units, drawn[int(np.nanargmin(scores))])

    def extract(self, params: Any, chosen: Chosen) -> tuple[Any, Any]:
        """Return the small network: its model and its parameters; from here on plain Flax.

        Args:
          params: Parameters, or variables.
          chosen: Its units; what fills up a sample is left out.

        Returns:
          `(module, variables)` of a factory, `(function, params)` of a function. Its outputs are those of the whole
          network with `masked` parameters.
        """
        units = self.units(params)
        exact = self._exact(units, chosen)
        return self._models.of(units, exact.capacities), _narrow.narrow(units, params, exact)

    def _exact(self, units: Units, chosen: Chosen) -> Chosen:
        masks = jax.device_get(chosen.masks(units))
        empty = [name for name, mask in masks.items() if not mask.any()]
        if empty:
            raise ValueError(f"The sample has no unit of {', '.join(empty)}: a layer would be empty.")
        return chosen_of(masks, {name: int(mask.sum()) for name, mask in masks.items()})

    def _number(self, every: int, step: Any) -> Any:
        budget = jnp.asarray(self._budget(step), jnp.float32) if callable(self._budget) else self._budget
        return budget * every if self._is_share else budget


def _check_structure(structure: Structure, units: Units) -> None:
    got = {name: s.size for name, s in structure.probabilities.items()}
    expected = {name: group.size for name, group in units.items()}
    if got != expected:
        raise ValueError(
            f"The structure has probabilities of {got} units, and the parameters have {expected}. Was that of another "
            "model restored? sub.init(params) makes it."
        )
