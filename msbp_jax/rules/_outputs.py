"""The rule of a program's outputs: their gradient is chosen from once, where it enters.

forward     outputs, untouched
backward    g = all of their gradients side by side, [rows, n];   p, m' = S(g, m);   p in the place of g
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.carriers import Carriers
from msbp_jax.formats import accumulation_dtype
from msbp_jax.rules._operation import Dims
from msbp_jax.rules._rule import Site, returned_state, sparsify
from msbp_jax.sparsifiers._base import Sparsifier, State
from msbp_jax.sparsifiers._keys import Kinds, bits_as_keys, keys_as_bits, keys_of_devices

type Outputs = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputsRule:
    """All that is static.

    Attributes:
      sparsifier: `S`.
      kinds: Which leaves of the state are PRNG keys, and of which kind; inside they are passed on as bits.
    """

    sparsifier: Sparsifier
    kinds: Kinds = ()


def sparse_outputs(sparsifier: Sparsifier, outputs: Outputs, site: Site) -> Outputs:
    """Return outputs, of whose gradient a sparsifier chooses.

    Args:
      sparsifier: `S`.
      outputs: Floating arrays that share axis 0, the rows.
      site: State, and carriers of the new state.
    """
    state, kinds = keys_as_bits(keys_of_devices(site.state, outputs))
    leaves, structure = jax.tree.flatten((outputs, site._replace(state=state)))
    outputs, site = jax.tree.unflatten(structure, _compat.varying_alike(leaves)[0])
    return _outputs(OutputsRule(sparsifier=sparsifier, kinds=kinds), outputs, site)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outputs(rule: OutputsRule, outputs: Outputs, site: Site) -> Outputs:
    del rule, site
    return outputs


def _forward(rule: OutputsRule, outputs: Any, site: Any) -> tuple[Outputs, tuple[Outputs, Site]]:
    del rule
    outputs, site = jax.tree.map(lambda leaf: leaf.value, (outputs, site), is_leaf=_compat.is_primal)
    return outputs, (outputs, site)


def _backward(rule: OutputsRule, residuals: tuple[Outputs, Site], gradients: Any) -> tuple[tuple[Any, Any], None]:
    outputs, (state, carriers) = residuals
    if all(map(_compat.is_symbolic_zero, gradients)):
        return (None, None), None
    filled = tuple(
        jnp.zeros_like(y) if _compat.is_symbolic_zero(g) else g for y, g in zip(outputs, gradients, strict=True)
    )
    chosen, returned = _compat.with_automatic_sharding(
        functools.partial(_choose, rule, bool(carriers)), (filled, state), (outputs, carriers or [])
    )
    returned = jax.tree.map(_compat.varying_like, returned, carriers or [])
    return (chosen, Site(None, returned or None)), None


_compat.define_vjp_with_logs(_outputs, _forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(rule: OutputsRule, remembers: bool, gradients: Outputs, state: State) -> tuple[Outputs, list[Carriers]]:
    state = bits_as_keys(state, rule.kinds)
    g = side_by_side(gradients)
    dims = Dims((), g.shape[0], g.shape[0], 0, g.shape[1])
    p, total, weight = sparsify(rule.sparsifier, g[None], state, dims, {})
    returned = returned_state(state, total, weight, g) if remembers else []
    return _apart(p.materialize(), gradients), returned


def side_by_side(arrays: Sequence[jax.Array]) -> Float[Array, "rows n"]:
    """Return arrays that share axis 0 as one matrix, of a dtype that holds them all."""
    dtype = common_dtype([array.dtype for array in arrays])
    matrices = [array.reshape(array.shape[0], math.prod(array.shape[1:])).astype(dtype) for array in arrays]
    return matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices, axis=1)


def common_dtype(dtypes: Sequence[Any]) -> Any:
    """Return a dtype that holds all of these floating ones: theirs if they are one."""
    return dtypes[0] if len(set(dtypes)) == 1 else accumulation_dtype(*dtypes)


def _apart(matrix: Float[Array, "rows n"], like: Outputs) -> Outputs:
    """Return the arrays that `side_by_side` was given."""
    widths = [math.prod(array.shape[1:]) for array in like]
    ends = [sum(widths[: number + 1]) for number in range(len(widths))]
    parts = [matrix[:, end - width : end] for width, end in zip(widths, ends, strict=True)]
    return tuple(part.reshape(array.shape).astype(array.dtype) for part, array in zip(parts, like, strict=True))
