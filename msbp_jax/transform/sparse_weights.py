"""`sparse_weights`: a model that computes with variables whose weights are sparse, as `prune` makes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from msbp_jax.carriers import OVERWRITE_WITH_GRADIENT
from msbp_jax.sparsifiers import dense
from msbp_jax.sparsifiers._base import State
from msbp_jax.transform._function import SparseFunction
from msbp_jax.transform._linen import SparseModule, is_linen
from msbp_jax.transform._nnx import SparseNNXModule, is_nnx
from msbp_jax.transform._plan import make_plan
from msbp_jax.transform._report import Report
from msbp_jax.transform._sparse_nnx import SparseWeightsNNXModule
from msbp_jax.weights import SPARSITY, with_patterns


def sparse_weights(target: Any, *, backend: str | None = None) -> Any:
    """Return a model that computes with sparse weights: forward and backward of their entries alone.

        y = x w,   dx = g wᵀ,   dw = (xᵀ g) at the entries of w

    The model is traced with dense weights. Wherever one that is sparse is multiplied, by all of its inputs or by all
    of its features, the product is a sparse one. Any other use sees the dense weight; its gradient is that of the
    entries all the same.

    Args:
      target: A Flax Linen or NNX module, a function `f(params, *args)`, or what `sparse_vjp` made of one: then the
        gradient that enters a sparse product is chosen from as the plan says. The order is
        `sparse_weights(sparse_vjp(model, plan))`.
      backend: Which backend runs the products with sparse weights: "native", "tiles" or "xla", which `jax.export` and
        second derivatives need; None to choose, or that of `sparse_vjp(backend=)`.

    Returns:
      For a Linen module, an object whose `apply` takes `{"params": .., "sparsity": .., ...}`, and whose `init` is the
      module's. For a function, `f(params, sparsity, *args)`. Both have `report`, and `init_memory` where the model is
      of `sparse_vjp`. For an NNX module, a module that is called as before, with `prune` and `densify`, which work in
      place, and with the patterns in `msbp.Sparsity` Variables.

    Raises:
      TypeError: `target` is none of these.
      ValueError: An NNX module of `sparse_vjp` that has a memory already, a part of a Linen module, or a backend that
        there is not.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, msbp_jax as msbp
      >>> x = jnp.ones((2, 8))
      >>> variables = msbp.prune(nn.Dense(4).init(jax.random.key(0), x), density=0.25)
      >>> variables["params"]["kernel"].shape
      (8,)
      >>> msbp.sparse_weights(nn.Dense(4)).apply(variables, x).shape
      (2, 4)

    References:
      Nikdan et al., SparseProp: efficient sparse backpropagation for faster training of neural networks, 2023 (arXiv
      2302.04852).
    """
    if isinstance(target, SparseWeightsModule | SparseWeightsFunction | SparseWeightsNNXModule):
        raise TypeError("sparse_weights was given a model of its own: one wrapping is enough.")
    if isinstance(target, type) or (not callable(target) and not isinstance(target, SparseModule)):
        raise TypeError(f"sparse_weights takes a Flax module or a function f(params, *args), got {target!r}.")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"There is no backend {backend!r} of sparse weights. Expected one of {', '.join(BACKENDS)}.")
    if isinstance(target, SparseModule | SparseFunction | SparseNNXModule) and target._backend in BACKENDS:
        backend = backend or target._backend
    if isinstance(target, SparseModule):
        return SparseWeightsModule(target, backend)
    if isinstance(target, SparseFunction):
        return SparseWeightsFunction(target, backend)
    plan = make_plan(dense(), 1)
    if isinstance(target, SparseNNXModule):
        if target.memory is not None:
            raise ValueError(
                "The model has a memory already. Call init_memory after sparse_weights, and on its result."
            )
        return SparseWeightsNNXModule(target.module, target._plan, target._backend, backend)
    if is_nnx(target):
        return SparseWeightsNNXModule(target, plan, None, backend)
    if is_linen(target):
        if target.parent is not None:
            raise ValueError(
                f"sparse_weights was called inside a Linen module, on its part {type(target).__name__}. Wrap the whole "
                "model, from outside; what is dense among its variables stays so."
            )
        return SparseWeightsModule(SparseModule(target, plan, None), backend)
    return SparseWeightsFunction(SparseFunction(target, plan, None), backend)


BACKENDS = ("native", "tiles", "xla")


class SparseWeightsModule:
    """A Linen module that computes with sparse weights; made by `sparse_weights`.

    Attributes:
      model: What was wrapped, as a module with a sparse backward.
    """

    def __init__(self, model: SparseModule, backend: str | None) -> None:
        self.model = model
        self._backend = backend

    @property
    def module(self) -> nn.Module:
        """The plain module."""
        return self.model.module

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the plain module's `init` returns: dense variables, to be pruned."""
        return self.model.init(*args, **kwargs)

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the plain module's `init_with_output` returns: dense variables."""
        return self.model.init_with_output(*args, **kwargs)

    def lazy_init(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the plain module's `lazy_init` returns: dense variables."""
        return self.model.lazy_init(*args, **kwargs)

    def tabulate(self, *args: Any, **kwargs: Any) -> str:
        """Return exactly what the plain module's `tabulate` returns."""
        return self.model.tabulate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say how a Linen module is called.

        Raises:
          TypeError: Always.
        """
        del args, kwargs
        raise TypeError(
            f"{type(self.module).__name__} is a Linen module: call it as model.apply(variables, *args), after "
            "variables = msbp.prune(model.init(key, *args), density=...)."
        )

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the module's `apply` returns with the dense weights that the sparse ones stand for.

        Args:
          variables: With "params" and "sparsity", as `msbp.prune` returns them; others as the module has them.
          *args: Arguments of the module.
          **kwargs: Further arguments, as the wrapped model's `apply` takes them, `memory` among them.

        Raises:
          ValueError: There is no "sparsity", or it is of other parameters.
        """
        return self.model.apply(_merged(variables, self._backend), *args, **kwargs)

    def init_memory(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, State]:
        """Return the memory at the start, of a model of `sparse_vjp`; takes what `apply` takes."""
        return self.model.init_memory(_merged(variables, self._backend), *args, **kwargs)

    def with_memory(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return parameters and a memory at its start as one pytree, as the wrapped model does; patterns stay apart."""
        found = self.model.with_memory(_merged(variables, self._backend), *args, **kwargs)
        return {**found, "params": _apart(variables["params"])[0]}

    def report(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Report:
        """Return what is sparse and what stays dense, and why; takes what `report` of `sparse_vjp` takes."""
        return self.model.report(_merged(variables, self._backend), *args, **kwargs)

    def __repr__(self) -> str:
        """Return what was wrapped."""
        return f"sparse_weights({self.model!r})"


class SparseWeightsFunction:
    """A function that computes with sparse weights; made by `sparse_weights`.

    Attributes:
      function: What was wrapped, as a function with a sparse backward.
    """

    def __init__(self, function: SparseFunction, backend: str | None) -> None:
        functools.update_wrapper(self, function.function, updated=())
        self.function = function
        self._backend = backend

    def __call__(self, params: Any, sparsity: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `f(params, *args)` with the dense weights that the sparse ones stand for.

        Args:
          params: Parameters, as `msbp.prune` returns them.
          sparsity: Their patterns.
          *args: As the function takes them.
          **kwargs: As the function takes them; `memory` for one of `sparse_vjp`.

        Raises:
          ValueError: The patterns are of other parameters.
        """
        return self.function(self._merged(params, sparsity), *args, **kwargs)

    def with_memory(self, params: Any, sparsity: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return parameters and a memory at its start as one pytree, which a call takes in place of the parameters."""
        found = self.function.with_memory(self._merged(_apart(params)[0], sparsity), *args, **kwargs)
        return {**found, "params": _apart(params)[0]}

    def _merged(self, params: Any, sparsity: Any) -> Any:
        own, carried = _apart(params)
        merged = with_patterns(own, sparsity, self._backend)
        return {**params, "params": merged} if carried else merged

    def init_memory(self, params: Any, sparsity: Any, *args: Any, **kwargs: Any) -> dict[str, State]:
        """Return the memory at the start, of a function of `sparse_vjp`; takes what a call takes."""
        return self.function.init_memory(self._merged(params, sparsity), *args, **kwargs)

    def report(self, params: Any, sparsity: Any, *args: Any, **kwargs: Any) -> Report:
        """Return what is sparse and what stays dense, and why; takes what `report` of `sparse_vjp` takes."""
        return self.function.report(self._merged(params, sparsity), *args, **kwargs)

    def __repr__(self) -> str:
        """Return what was wrapped."""
        return f"sparse_weights({self.function!r})"


def _merged(variables: Mapping[str, Any], backend: str | None) -> dict[str, Any]:
    if not isinstance(variables, Mapping) or "params" not in variables or SPARSITY not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f'sparse_weights computes with variables that have "params" and "{SPARSITY}", as msbp.prune returns them; '
            f"got {got}. The plain module computes with dense ones."
        )
    params, carried = _apart(variables["params"])
    variables = {**variables, "params": params, **carried}
    rest = {name: tree for name, tree in variables.items() if name != SPARSITY}
    return {**rest, "params": with_patterns(variables["params"], variables[SPARSITY], backend)}


def _apart(params: Any) -> tuple[Any, dict[str, Any]]:
    """Return parameters, and the memory that `with_memory` put among them, as a collection."""
    if isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params:
        return params["params"], {OVERWRITE_WITH_GRADIENT: params[OVERWRITE_WITH_GRADIENT]}
    return params, {}
