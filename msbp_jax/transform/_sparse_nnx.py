"""NNX modules with sparse weights: the values stay where they are, their patterns are Variables of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from msbp_jax._checks import path_name
from msbp_jax.dynamic import SparsitySchedule, SparsityState
from msbp_jax.transform._nnx import SparseNNXModule
from msbp_jax.transform._plan import Plan
from msbp_jax.weights import SPARSITY, Pattern, densify, is_pattern, prune, with_patterns


class Sparsity(nnx.Variable[Any]):
    """The Variable that holds the pattern of one sparse weight; whole numbers, which no optimizer touches.

    Example:
      >>> import msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_weights(nnx.Linear(8, 64, rngs=nnx.Rngs(0)))
      >>> model.prune(density=0.1)
      >>> [path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, msbp.Sparsity))]
      ['kernel']
    """


class SparseWeightsNNXModule(SparseNNXModule):
    """An NNX module that computes with sparse weights; made by `sparse_weights`.

    Attributes:
      module: The module that was wrapped. Once pruned it has values of the entries in place of its dense kernels, and
        is not to be called itself: `densify` a clone.
      sparsity: A `Sparsity` for each sparse weight, by its path.
    """

    def __init__(self, module: nnx.Module, plan: Plan, backend: str | None, weights_backend: str | None) -> None:
        super().__init__(module, plan, backend)
        self._weights_backend = weights_backend
        self.sparsity: dict[str, Sparsity] = nnx.data({})

    def prune(self, **options: Any) -> None:
        """Make weights sparse, in place: their values in `nnx.Param`, their patterns in `Sparsity` Variables.

        Make the optimizer afterwards, as its state is of the values.

        Args:
          **options: Those of `msbp.prune`.

        Raises:
          ValueError: It is pruned already, or as `msbp.prune`.
          TypeError: As `msbp.prune`.
        """
        params = self._params()
        pruned = prune({"params": _told(params), "sparsity": self._patterns()}, **options)
        for name, values in pruned["params"].items():
            params[name].set_value(values)
        self._set_patterns(pruned[SPARSITY])

    def densify(self) -> nnx.Module:
        """Make weights dense again, in place, with zeros for what was left out; return the plain module.

        Raises:
          ValueError: A pattern contradicts itself.
        """
        params = self._params()
        dense = densify({"params": _told(params), "sparsity": self._patterns()})
        for name, value in dense["params"].items():
            params[name].set_value(value)
        self.sparsity = nnx.data({})
        return self.module

    def sparse_variables(self, wrt: Any = nnx.Param) -> dict[str, Any]:
        """Return parameters and patterns as `msbp.prune` does, for `init` and `check` of a schedule.

        Args:
          wrt: An NNX filter: the Variables that the optimizer has.
        """
        patterns = {f"module/{name}": pattern for name, pattern in self._patterns().items()}
        return {"params": nnx.as_pure(nnx.state(self, wrt)), SPARSITY: patterns}

    def update_sparsity(
        self,
        schedule: SparsitySchedule,
        optimizer: nnx.Optimizer[Any],
        state: SparsityState,
        dense_grad_fn: Callable[[Any], Any] | None = None,
    ) -> SparsityState:
        """Count a step of a schedule, after the optimizer's; if it is due, patterns and moments change in place.

        Args:
          schedule: Of sparse training, such as `msbp.rigl`.
          optimizer: Of this model.
          state: Of the last update, or of `schedule.init(model.sparse_variables())`.
          dense_grad_fn: `f(module) -> grads`, as `nnx.grad` of a loss is, called with a dense copy of the plain module
            where the schedule asks for the dense gradient.

        Returns:
          The next state of the schedule.

        Raises:
          ValueError: As the schedule's `update`.
        """

        def of_arrays(dense: Any) -> Any:
            assert dense_grad_fn is not None
            module = nnx.clone(self.module)
            nnx.update(module, dense["module"])
            return {"module": nnx.as_pure(dense_grad_fn(module))}

        gradient = None if dense_grad_fn is None else of_arrays
        variables, opt_state = self.sparse_variables(optimizer.wrt), nnx.as_pure(optimizer.opt_state)
        variables, opt_state, state = schedule.update(optimizer.tx, variables, opt_state, state, gradient)
        nnx.update(self, variables["params"])
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        self._set_patterns(variables.get(SPARSITY, {}), "module/")
        return state

    def _set_patterns(self, patterns: Any, above: str = "") -> None:
        """Keep patterns in Variables, those that there are if the weights are the same."""
        found = jax.tree_util.tree_flatten_with_path(patterns, is_leaf=is_pattern)[0]
        by_name = {path_name(path).removeprefix(above): pattern for path, pattern in found}
        if by_name.keys() != self.sparsity.keys():
            self.sparsity = nnx.data({name: Sparsity(pattern) for name, pattern in by_name.items()})
        for name, pattern in by_name.items():
            self.sparsity[name].set_value(pattern)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        params = self._params()
        kept = {name: params[name].get_value() for name in self.sparsity}
        try:
            return super()._run(method, *args, **kwargs)
        finally:  # a call that writes anything writes all back, the weights as it saw them
            for name, values in kept.items():
                if params[name].get_value() is not values:
                    params[name].set_value(values)

    def _params(self) -> dict[str, nnx.Variable[Any]]:
        flat = nnx.to_flat_state(nnx.state(self.module, nnx.Param))
        graph = dict(nnx.iter_graph(self.module))
        return {"/".join(map(str, path)): graph[path] for path, _ in flat}

    def _patterns(self) -> dict[str, Pattern]:
        return {name: variable.get_value() for name, variable in self.sparsity.items()}

    def _given(self, params: Any) -> Any:
        return with_patterns(params, self._patterns(), self._weights_backend) if self.sparsity else params

    @property
    def _is_plain(self) -> bool:
        return not self.sparsity


def _told(params: dict[str, nnx.Variable[Any]]) -> dict[str, Any]:
    return {name: variable.get_value() for name, variable in params.items()}
