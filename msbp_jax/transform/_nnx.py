"""The adapter for Flax NNX modules: a module that is called as before, with its memory in Variables of their own."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from msbp_jax import _compat
from msbp_jax.sparsifiers._base import State
from msbp_jax.transform._function import SparseFunction
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._report import Report


class Memory(nnx.Variable[Any]):
    """The Variable that holds the state of one site's sparsifier, between steps and in checkpoints.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=4), decay=0.8))
      >>> memory = model.init_memory(jnp.ones((2, 8)))
      >>> [path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, msbp.Memory))]
      ['kernel']
    """


class SparseNNXModule(nnx.Module):
    """An NNX module whose contractions with a parameter have a sparse backward; made by `sparse_vjp`.

    Attributes:
      module: The module that was wrapped.
      memory: A `Memory` for each sparse site, by its name; None before `init_memory`.
    """

    def __init__(self, module: nnx.Module, plan: Plan, backend: str | None) -> None:
        self.module = module
        self.memory: dict[str, Memory] | None = nnx.data(None)
        self._plan = plan
        self._backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain module returns; once there is a memory, its derivative is the sparse one.

        Under `msbp.nnx.value_and_grad` the memory takes on its new value; under `nnx.grad` it stays as it was. Other
        Variables (batch statistics, counts of random numbers) change as they do in the plain module. For evaluation
        `model.module(...)`, the plain module, returns the same and is never traced.

        Args:
          *args: Arguments of the module.
          **kwargs: Likewise.

        Raises:
          ValueError: It is seen to be differentiated before `init_memory` was called, or the memory is of other shapes.
        """
        graphdef, params, rest = _parts(self.module)
        if self.memory is None:
            self._check_not_differentiated((params, rest, args, kwargs))
            return self.module(*args, **kwargs)
        memory = {name: variable.get_value() for name, variable in self.memory.items()}
        result, changed = self._function(graphdef)(params, rest, args, kwargs, memory=memory)
        nnx.update(self.module, changed)
        return result

    def init_memory(self, *args: Any, **kwargs: Any) -> dict[str, State]:
        """Make the memory for arguments of these shapes, in place of the one there is; nothing is run.

        Args:
          *args: As in a call; ShapeDtypeStructs will do.
          **kwargs: Likewise.

        Returns:
          What the Variables now hold: a dict from site names to the state of their sparsifier.

        Raises:
          ValueError: There is no contraction with a parameter, or a pattern of the plan matches nothing.
        """
        graphdef, params, rest = _parts(self.module)
        memory = self._function(graphdef).init_memory(params, rest, args, kwargs)
        self.memory = nnx.data({name: Memory(state) for name, state in memory.items()})
        return memory

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Return what is sparse and what stays dense, and why; `print` it.

        Args:
          *args: As in a call; ShapeDtypeStructs will do.
          **kwargs: Likewise.

        Raises:
          ValueError: There is no contraction with a parameter, or a pattern of the plan matches nothing.
        """
        graphdef, params, rest = _parts(self.module)
        return self._function(graphdef).report(params, rest, args, kwargs)

    def _function(self, graphdef: Any) -> SparseFunction:
        def call(params: Any, rest: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            module = nnx.merge(graphdef, params, rest, copy=True)
            result = module(*args, **kwargs)
            return result, nnx.state(module, nnx.Not(nnx.Param))

        call.__name__ = type(self.module).__name__
        return SparseFunction(call, self._plan, self._backend, type(self.module).__qualname__)

    def _check_not_differentiated(self, tree: Any) -> None:
        if any(_compat.under_differentiation(leaf) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"{type(self.module).__name__} is differentiated before it has a memory, which would be a dense "
                "backward. Call model.init_memory(*arguments), with arguments of the batch's shapes, first."
            )


def _parts(module: nnx.Module) -> tuple[Any, Any, Any]:
    graphdef, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    return graphdef, params, rest


def is_nnx(target: Any) -> bool:
    """Whether `target` is an NNX module."""
    return isinstance(target, nnx.Module)
