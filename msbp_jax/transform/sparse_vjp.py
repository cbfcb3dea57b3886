r"""`sparse_vjp`: give every contraction with a parameter a sparse backward.

    f(params, *args)                        ->   f(params, *args, memory=memory)

The function is traced to a jaxpr (`_program`); data flow (`_sources`, `_discover`) finds the contractions with a
parameter on one side; they get a name and, from the plan, a sparsifier (`_sites`, `_plan`); the program is evaluated
with rules in their place (`_evaluate`), whose forward is the contraction itself and whose backward is

    u = g + m,   p = S(u),   dx = p wᵀ,   dw = xᵀ p,   m' = decay R(u - p).

It is applied before differentiation. Without `memory` the wrapped function is the function itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

from msbp_jax import kernels
from msbp_jax.sparsifiers import Sparsifier
from msbp_jax.transform._function import SparseFunction
from msbp_jax.transform._linen import LinenModule, SparseModule, is_linen
from msbp_jax.transform._nnx import NNXModule, SparseNNXModule, is_nnx
from msbp_jax.transform._plan import make_plan
from msbp_jax.transform._sparse_nnx import SparseWeightsNNXModule
from msbp_jax.transform.sparse_weights import SparseWeightsFunction, SparseWeightsModule


@overload
def sparse_vjp(  # type: ignore[overload-overlap]  # a module is callable too
    target: LinenModule,
    plan: Sparsifier | Mapping[str, Sparsifier],
    *,
    min_features: int = ...,
    backend: str | None = ...,
    memory_name: str = ...,
) -> SparseModule: ...


@overload
def sparse_vjp(  # type: ignore[overload-overlap]
    target: NNXModule,
    plan: Sparsifier | Mapping[str, Sparsifier],
    *,
    min_features: int = ...,
    backend: str | None = ...,
    memory_name: str = ...,
) -> SparseNNXModule: ...


@overload
def sparse_vjp(
    target: Callable[..., Any],
    plan: Sparsifier | Mapping[str, Sparsifier],
    *,
    min_features: int = ...,
    backend: str | None = ...,
    memory_name: str = ...,
) -> SparseFunction: ...


def sparse_vjp(
    target: Any,
    plan: Sparsifier | Mapping[str, Sparsifier],
    *,
    min_features: int = 64,
    backend: str | None = None,
    memory_name: str = "memory",
) -> Any:
    r"""Wrap a model or a function so that its backward propagates only the important part of each gradient.

    For every contraction `y = x w` of a parameter with data (matrix products, convolutions, ragged products), and
    `g = dL/dy`,

        u = g + m,   p = S(u),   dx = p wᵀ,   dw = xᵀ p,   m' = decay R(u - p),

    where `S` is the sparsifier and `m` its memory, if it has one. The forward is untouched, and so are biases,
    everything elementwise, and contractions without a parameter. Contractions are found inside jit, scan, cond,
    remat, vmap and shard_map; bodies of `while` and functions with a derivative rule of their own are left alone, and
    named in the report.

    Args:
      target: A Flax module (Linen or NNX), or a function `f(params, *args)` whose first argument is a pytree of arrays.
      plan: A sparsifier for all sites, or a mapping from shell-style patterns over site names to sparsifiers, of which
        the first match wins; sites that no pattern matches stay dense. Sites are named by the path of their parameter;
        `"@outputs"` is the gradient that enters the model, over axis 0 of its floating outputs. `sample_rows(...)`
        alone is short for `{"@outputs": sample_rows(...), "*": skip_zero_rows()}`.
      min_features: Sites with fewer output features stay dense, unless a pattern other than `"*"` names them; there is
        little to choose from and nothing to gain.
      backend: Which backend runs the products, and the selection where it has one; None chooses. `msbp.backends()`
        lists them.
      memory_name: Keyword under which the wrapped function, or `apply`, takes the memory; for a model that has an
        argument `memory` itself.

    Returns:
      For a Linen module, an object with its `init`, and with `apply`, `init_memory` and `report`. For a function, a
      function with `init_memory` and `report`. Both take `memory=`. For an NNX module, a module that is called as
      before and keeps its memory in `msbp.Memory` Variables; `init_memory` makes them.

    Raises:
      TypeError: `target` is not a module or a function, or is wrapped already; the plan is not of sparsifiers.
      ValueError: The plan is empty, `min_features < 1`, `backend` unknown, `target` a part of a Linen module, or it
        has an argument of the memory's name itself.

    Example:
      >>> import jax, jax.numpy as jnp, msbp_jax as msbp
      >>> def f(params, x):
      ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jax.random.normal(jax.random.key(0), (8, 128)), "w2": jnp.ones((128, 1))}
      >>> f = msbp.sparse_vjp(f, msbp.memorized(msbp.top_k(k=5, rows_per_group=4), decay=0.8))
      >>> x = jax.random.normal(jax.random.key(1), (4, 8))
      >>> memory = f.init_memory(params, x)
      >>> loss = lambda params, memory, x: f(params, x, memory=memory).mean()
      >>> value, grads, memory = msbp.value_and_grad(loss)(params, memory, x)
      >>> int(jnp.count_nonzero(grads["w1"].any(axis=0)))
      5

    References:
      Zhang et al., Memorized Sparse Backpropagation, 2019 (arXiv 1905.10194). Sun et al., meProp, 2017 (arXiv
      1706.06197).
    """
    checked = make_plan(plan, min_features)
    if backend is not None and backend not in (known := sorted({b for of in kernels.backends().values() for b in of})):
        unbuilt = f" {kernels.NOT_BUILT}" if backend == "native" else ""
        raise ValueError(
            f"There is no backend {backend!r}. Expected one of: {', '.join(known)}; or None to choose.{unbuilt}"
        )
    _check_target(target)
    if is_nnx(target):
        return SparseNNXModule(target, checked, backend)
    _check_memory_name(target.__call__ if is_linen(target) else target, memory_name)
    if is_linen(target):
        return SparseModule(target, checked, backend, memory_name)
    return SparseFunction(target, checked, backend, memory_name)


_ORDER = (
    "sparse_vjp was given a model of sparse_weights. The order is the other one: "
    "msbp.sparse_weights(msbp.sparse_vjp(model, plan))."
)


def _check_target(target: Any) -> None:
    if isinstance(target, SparseWeightsNNXModule):
        raise TypeError(_ORDER)
    if isinstance(target, SparseFunction | SparseModule | SparseNNXModule):
        what = target.module if isinstance(target, SparseModule | SparseNNXModule) else target.function
        name = getattr(what, "__name__", type(what).__name__)
        raise TypeError(
            f"sparse_vjp was given a {type(target).__name__}, which it made itself from {name}: one wrapping is "
            "enough, with one plan for all."
        )
    if isinstance(target, SparseWeightsModule | SparseWeightsFunction):
        raise TypeError(_ORDER)
    if isinstance(target, type):
        raise TypeError(
            f"sparse_vjp wraps a module, not its class, got the class {target.__name__}. Make one first: "
            f"msbp.sparse_vjp({target.__name__}(...), ...)."
        )
    if is_linen(target) and target.parent is not None:
        raise ValueError(
            f"sparse_vjp was called inside a Linen module, on its part {type(target).__name__}. Wrap the whole "
            "model, from "
            'outside, and say by a plan which parts are meant: msbp.sparse_vjp(model, {"'
            + (target.name or "part")
            + '/*": ...}).'
        )
    if not callable(target):
        raise TypeError(f"sparse_vjp wraps a Flax module or a function f(params, *args), got {target!r}.")


def _check_memory_name(function: Any, name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"memory_name must be the name of a keyword argument, got {name!r}.")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in function may have no signature
        return
    if name in parameters:
        raise ValueError(
            f"What is wrapped has an argument {name} itself, so that {name}=... could mean either. Choose another "
            "name for "
            f'the memory of the backward, such as msbp.sparse_vjp(..., memory_name="backward_memory").'
        )
