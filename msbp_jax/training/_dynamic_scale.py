"""Dynamic loss scaling for float16: Flax's `DynamicScale`, with a memory that a step which overflows leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.training.dynamic_scale
import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.memory import MemorizedState
from msbp_jax.sparsifiers._keys import select_keys
from msbp_jax.training._value_and_grad import check_loss, check_result, value_and_grad


class ScaledStep(NamedTuple):
    """What `DynamicScale.value_and_grad` returns.

    Attributes:
      dynamic_scale: With the scale for the next step.
      finite: Whether all gradients are; a step that is not should be skipped.
      value: The loss, or `(loss, aux)`, not scaled.
      grads: The gradients, float32, not scaled.
      memory: The new memory; the old one, if the gradients are not finite.
    """

    dynamic_scale: DynamicScale
    finite: jax.Array
    value: Any
    grads: Any
    memory: Any


class DynamicScale(flax.training.dynamic_scale.DynamicScale):
    r"""Flax's dynamic loss scaling with a memory.

        grads = grad(scale * loss) / scale;   the scale grows after `growth_interval` finite steps, and shrinks after
        one that is not.

    The memory is kept in the units of the gradient itself: it is multiplied by the scale on its way in, and divided by
    it on its way out (exact, as scales are powers of two), so that it outlives a change of the scale.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=8), decay=0.8))
      >>> w, x = jnp.ones((4, 64)), jnp.ones((2, 4))
      >>> loss_fn = lambda w, memory, x: (f(w, x, memory=memory) ** 2).mean()
      >>> step = msbp.DynamicScale(scale=1024.0).value_and_grad(loss_fn)(w, f.init_memory(w, x), x)
      >>> bool(step.finite), float(step.value)
      (True, 16.0)

    References:
      Micikevicius et al., Mixed Precision Training, 2018 (arXiv 1710.03740).
    """

    def value_and_grad(  # type: ignore[override]
        self, loss_fn: Callable[..., Any], *, has_aux: bool = False, microbatches: int | None = None
    ) -> Callable[..., ScaledStep]:
        """Turn a loss into a function that returns its value, gradients and memory, scaling the loss on the way.

        Args:
          loss_fn: `loss_fn(params, memory, *args, **kwargs)`, as for `msbp.value_and_grad`.
          has_aux: As for `msbp.value_and_grad`.
          microbatches: As for `msbp.value_and_grad`.

        Returns:
          A function of the same arguments that returns a `ScaledStep`. Skip the update where it is not `finite`, for
          example `jax.tree.map(lambda new, old: jnp.where(step.finite, new, old), updated, params)`, or by
          `optax.apply_if_finite`.
        """
        scale = jnp.asarray(self.scale, jnp.float32)

        def scaled(params: Any, memory: Any, *args: Any, **kwargs: Any) -> Any:
            result = loss_fn(params, memory, *args, **kwargs)
            check_result(result, has_aux)
            loss, aux = result if has_aux else (result, None)
            check_loss(loss)
            return scale * jnp.asarray(loss, jnp.float32), (loss, aux)

        def wrapped(params: Any, memory: Any, *args: Any, **kwargs: Any) -> ScaledStep:
            step = value_and_grad(scaled, has_aux=True, microbatches=microbatches)
            (_, (loss, aux)), grads, after = step(params, _times(memory, scale), *args, **kwargs)
            loss = loss if microbatches is None else loss.mean(axis=0)
            has_gradient = lambda g: g.dtype != jax.dtypes.float0
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale if has_gradient(g) else g, grads)
            numbers = [g for g in jax.tree.leaves(grads) if has_gradient(g)]
            finite = jnp.stack([jnp.isfinite(g).all() for g in numbers]).all()
            kept = jax.tree.map(functools.partial(_chosen, finite), _times(after, 1 / scale), memory)
            return ScaledStep(self._after(finite, scale), finite, (loss, aux) if has_aux else loss, grads, kept)

        return wrapped

    def _after(self, finite: jax.Array, scale: jax.Array) -> DynamicScale:
        grow = jnp.asarray(self.fin_steps) == self.growth_interval
        larger = jnp.minimum(scale * self.growth_factor, jnp.finfo(jnp.float32).max)
        smaller = jnp.maximum(scale * self.backoff_factor, self.minimum_scale or 0.0)
        new_scale = jnp.where(finite, jnp.where(grow, larger, scale), smaller)
        steps = jnp.where(grow | ~finite, 0, jnp.asarray(self.fin_steps) + 1)
        return self.replace(fin_steps=steps, scale=new_scale)


def _chosen(finite: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    if _compat.is_key(old):
        return select_keys(jnp.broadcast_to(finite, old.shape), new, old)
    return jnp.where(finite, new, old)


def _times(memory: Any, factor: jax.Array) -> Any:
    """Return a memory whose residuals are multiplied, wherever they are; what else sparsifiers keep stays as it is."""

    def scaled(node: Any) -> Any:
        if not isinstance(node, MemorizedState):
            return node
        return MemorizedState(node.residual * factor, _times(node.inner, factor))

    return jax.tree.map(scaled, memory, is_leaf=lambda node: isinstance(node, MemorizedState))
