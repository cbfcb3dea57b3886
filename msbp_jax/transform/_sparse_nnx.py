"""NNX modules with sparse weights: the values stay where they are, their patterns are Variables of their own."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from msbp_jax._checks import path_name
from msbp_jax.transform._nnx import SparseNNXModule
from msbp_jax.transform._plan import Plan
from msbp_jax.weights import Pattern, densify, prune, with_patterns


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
        is_pattern = lambda node: isinstance(node, Pattern)
        found = jax.tree_util.tree_flatten_with_path(pruned["sparsity"], is_leaf=is_pattern)[0]
        self.sparsity = nnx.data({path_name(path): Sparsity(pattern) for path, pattern in found})

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
