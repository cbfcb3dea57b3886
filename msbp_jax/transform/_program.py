"""A call of the user's function as a program: traced, its sites named, ready to run or to be described."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from msbp_jax import _compat
from msbp_jax._checks import check_parameters, is_array, path_name
from msbp_jax.rules import Rule, Tracker, logged_rank, unwrap
from msbp_jax.transform._discover import discover
from msbp_jax.transform._evaluate import evaluate
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._sites import Site, check_memory, init_memory, name_sites
from msbp_jax.transform._sources import DATA, Source


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One traced call.

    Attributes:
      jaxpr: What the function computes, from parameter leaves and then the other arrays.
      arguments: Those arrays; ShapeDtypeStructs where the call was abstract.
      parameters: Path and shape of each parameter leaf.
      sites: Its contractions.
      rebuild: Turns the jaxpr's results into the function's result.
      backend: Which backend runs the products; None chooses.
    """

    jaxpr: _compat.ClosedJaxpr
    arguments: list[Any]
    parameters: list[tuple[str, int]]
    sites: list[Site]
    rebuild: Callable[[list[Any]], Any]
    backend: str | None

    @property
    def sparse_sites(self) -> list[Site]:
        """The sites that have a sparsifier."""
        return [site for site in self.sites if site.sparsifier is not None]

    def init_memory(self) -> dict[str, Any]:
        """Return the memory at the start."""
        return init_memory(self.sites)

    def run(self, memory: Any) -> Any:
        """Return the function's result, with the sparse backward behind it.

        Raises:
          TypeError: `memory` is not a mapping.
          ValueError: `memory` is of another model, plan or batch.
        """
        check_memory(memory, self.sites)
        rules, states = {}, {}
        for site in self.sparse_sites:
            state, tracker, leaves = unwrap(memory[site.name])
            rules[site.found.place] = self._rule(site, state, tracker, leaves)
            states[site.found.place] = state
        loops = {site.found.place: site.loops for site in self.sparse_sites}
        return self.rebuild(evaluate(self.jaxpr, self.arguments, rules, loops, states))

    def _rule(self, site: Site, state: Any, tracker: Tracker | None, leaves: tuple[int, ...]) -> Rule:
        assert site.sparsifier is not None
        assert site.operation is not None
        key = None
        if tracker is not None:
            loops = [loop for loop in site.loops if loop.logged]
            axes = "".join("i" if loop.instances else "s" for loop in loops)
            ranks = tuple(logged_rank(leaf) - axes.count("i") for leaf in jax.tree.leaves(state))
            mesh = tuple((number, loop.length) for number, loop in enumerate(loops) if loop.mesh_axis)
            key = tracker.key(site.name, leaves, ranks, axes, mesh)
        return Rule(
            operation=site.operation,
            side=site.side,
            sparsifier=site.sparsifier,
            key=key,
            observe=tracker.observe if tracker is not None else "",
            backend=self.backend,
        )


def trace(
    function: Callable[..., Any],
    plan: Plan,
    backend: str | None,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Program:
    """Trace `function(params, *args, **kwargs)` and name its sites.

    Arguments that are arrays (or ShapeDtypeStructs) are traced; everything else, such as a flag, is passed as it is.

    Raises:
      TypeError: A parameter is not an array, or not of a floating dtype.
      ValueError: There are no parameters, no contraction with one, or a pattern of the plan that matches nothing.
    """
    keyed, params_structure = jax.tree_util.tree_flatten_with_path(params)
    check_parameters(keyed)
    leaves = [leaf for _, leaf in keyed]
    rest, rest_structure = jax.tree.flatten((args, kwargs))
    traced = [leaf for leaf in rest if is_array(leaf)]
    result_structure: list[Any] = []

    def flat_function(leaves: list[Any], traced: list[Any]) -> list[Any]:
        arrays = iter(traced)
        filled = [next(arrays) if is_array(leaf) else leaf for leaf in rest]
        args, kwargs = jax.tree.unflatten(rest_structure, filled)
        result = function(jax.tree.unflatten(params_structure, leaves), *args, **kwargs)
        results, structure = jax.tree.flatten(result)
        fixed = [None if is_array(leaf) else leaf for leaf in results]
        result_structure.append((structure, fixed, [is_array(leaf) for leaf in results]))
        return [leaf for leaf in results if is_array(leaf)]

    jaxpr = jax.make_jaxpr(flat_function)(leaves, traced)
    structure, fixed, are_arrays = result_structure[-1]

    def rebuild(results: list[Any]) -> Any:
        arrays = iter(results)
        filled = [next(arrays) if array else leaf for array, leaf in zip(are_arrays, fixed, strict=True)]
        return jax.tree.unflatten(structure, filled)

    parameters = [(path_name(path), int(np.prod(leaf.shape))) for path, leaf in keyed]
    sources = [Source(frozenset({number})) for number in range(len(leaves))] + [DATA] * len(traced)
    found = discover(jaxpr, sources)
    if not any(contraction.side for contraction in found):
        names = ", ".join(path for path, _ in parameters)
        raise ValueError(
            f"No contraction has one of the parameters ({names}) on one side, so there is nothing to make sparse. "
            "sparse_vjp works on matrix products and convolutions of a parameter with data."
        )
    return Program(
        jaxpr=jaxpr,
        arguments=[*leaves, *traced],
        parameters=parameters,
        sites=name_sites(found, parameters, plan),
        rebuild=rebuild,
        backend=backend,
    )
