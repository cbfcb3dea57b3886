"""What XLA makes of elementwise equations: loops over arrays, each of which runs through several of them.

An equation's result is written only where something reads it that is no part of such a loop, or where it is costly and
read more than once. Everything else stays in registers. So its work is arithmetic on every entry, and the bytes of the
arrays that a loop begins and ends with.
"""

from __future__ import annotations

import collections

from msbp_jax.kernels.choice.costs.equations import Equation, Listing, Token, bytes_of, names, size_of

# What is no elementwise loop, nor a part of one.
_APART = names(
    "dot_general conv_general_dilated ragged_dot_general ffi_call scan while cond shard_map gather "
    "concatenate dynamic_update_slice dynamic_slice sort top_k approx_top_k argmax argmin "
    "select_and_scatter select_and_scatter_add pallas_call custom_partitioning"
)
_COSTLY = names(
    "exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv sin cos tan pow cbrt lgamma digamma atan2 "
    "sinh cosh asin acos atan"
)
_SLOW = names("div sqrt rsqrt")
# Nothing is computed: an entry is read from another place, or is the same everywhere.
_EVERYWHERE = names("broadcast_in_dim iota")
_NOTHING = names("broadcast_in_dim iota slice convert_element_type rev split copy_p")
_SMALL = 2**20  # bytes of an array that is still in a cache when it is read


def is_fused(equation: Equation) -> bool:
    """Whether an equation is done within a loop over entries."""
    name = equation.name
    apart = name in _APART or name.startswith(("reduce", "scatter", "cum", "random", "threefry", "rng"))
    return name == "reduce_precision" or not apart


def arrays(listed: Listing) -> set[Token]:
    """Return what a program holds in memory: what a loop ends with, and what is made by no loop."""
    makers = {token: equation for equation in listed.equations for token in equation.outputs}
    readers = collections.Counter(token for eqn in listed.equations for token in dict.fromkeys(eqn.inputs))
    stored = {token for token, eqn in makers.items() if not is_fused(eqn)}
    asked = set(listed.results)
    for equation in listed.equations:
        if not is_fused(equation) and not _takes_loops(equation):
            asked.update(equation.inputs)
    for token in makers.keys() - stored:
        twice = readers[token] > 1 and makers[token].name in _COSTLY | _SLOW
        if twice or (token in asked and makers[token].name not in _EVERYWHERE):
            stored.add(token)
    return stored


def elementwise(listed: Listing, stored: set[Token]) -> dict[str, tuple[int | float, ...]]:
    """Return loops, entries that are computed, those by a costly function, those that are padded, and bytes moved.

    Args:
      listed: The program's equations.
      stored: What it holds in memory.
    """
    makers = {token: equation for equation in listed.equations for token in equation.outputs}
    loops = computed = costly = padded = 0
    moved: set[Token] = set()
    for equation in listed.equations:
        in_loops = is_fused(equation)
        if in_loops or _takes_loops(equation):
            moved.update(t for t in equation.inputs if t is not None and (t in stored or t not in makers))
        if not in_loops:
            continue
        entries = max(map(size_of, equation.results), default=0)
        costly += entries * (equation.name in _COSTLY)
        padded += sum(map(size_of, equation.avals[:1])) * (equation.name == "pad")
        computed += entries * (equation.name not in _COSTLY | _NOTHING | {"pad"})
        ends = stored.intersection(equation.outputs)
        loops += len(ends)
        moved |= ends
    sizes = [size for token, size in sizes_of(listed).items() if token in moved]
    near = sum(size for size in sizes if size <= _SMALL)
    return {"loops": (loops, computed, costly, padded, near, sum(sizes) - near)}


def _takes_loops(equation: Equation) -> bool:
    """Whether its operands are computed within it."""
    return equation.name.startswith("reduce") and not equation.name.startswith("reduce_window")


def sizes_of(listed: Listing) -> dict[Token, int]:
    """Return the bytes of everything that a program's equations read and make."""
    return {
        token: bytes_of(aval)
        for eqn in listed.equations
        for token, aval in zip((*eqn.inputs, *eqn.outputs), (*eqn.avals, *eqn.results), strict=True)
        if token is not None
    }
