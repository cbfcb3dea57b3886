"""A call of the user's function as a program: traced, its sites named, ready to run or to be described."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import _compat
from msbp_jax._checks import check_parameters, is_array, path_name
from msbp_jax.carriers import Carriers, Observer, narrowed, unwrap
from msbp_jax.memory import check_no_states
from msbp_jax.rules import Rule
from msbp_jax.rules import Site as SiteState
from msbp_jax.transform._discover import discover
from msbp_jax.transform._evaluate import Placed, evaluate
from msbp_jax.transform._outputs import Outputs, find_outputs
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._remembers import Remembers, check_memory, init_memory
from msbp_jax.transform._sites import Site, name_sites
from msbp_jax.transform._sources import CONSTANT, DATA, Source
from msbp_jax.transform._sparse_operands import dense
from msbp_jax.weights import SparseWeight, is_sparse


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One traced call.

    Attributes:
      jaxpr: What the function computes, from parameter leaves and then the other arrays.
      arguments: Those arrays; ShapeDtypeStructs where the call was abstract.
      parameters: Path and shape of each parameter leaf.
      sites: Its contractions.
      weights: Its sparse weights, by the number of their parameter.
      outputs: The gradient that enters it, if the plan names it.
      is_output: Which of the jaxpr's results are the model's outputs, and not collections that it changes.
      states: How many arguments behind the parameters are a module's variables, and not what its user passes.
      rebuild: Turns the jaxpr's results into the function's result.
      plan: Which sparsifier each site gets.
      label: What the keys of random sparsifiers start from, besides the site: what was wrapped.
      backend: Which backend runs the products; None chooses.
    """

    jaxpr: _compat.ClosedJaxpr
    arguments: list[Any]
    parameters: list[tuple[str, int]]
    sites: list[Site]
    weights: dict[int, SparseWeight]
    outputs: Outputs | None
    is_output: tuple[bool, ...]
    states: int
    rebuild: Callable[[list[Any]], Any]
    plan: Plan
    label: str
    backend: str | None

    @property
    def sparse_sites(self) -> list[Site]:
        """The sites that have a sparsifier."""
        return [site for site in self.sites if site.sparsifier is not None]

    @property
    def is_sparse(self) -> bool:
        """Whether its gradients are others than plain JAX's."""
        return bool(self.sparse_sites) or (self.outputs is not None and self.outputs.sparsifier is not None)

    def init_memory(self) -> dict[str, Any]:
        """Return the memory at the start.

        Raises:
          ValueError: A pattern of the plan matches nothing, or can never apply.
        """
        self.check_plan()
        return self._warned_start()

    def start(self) -> dict[str, Any]:
        """Return the memory at the start of the sites that this call reaches."""
        return init_memory(self.remembering, self.label)

    def empty_memory(self) -> dict[str, Any]:
        """Return the memory of sites none of which has a state, for a call for which nobody made one.

        Raises:
          ValueError: A pattern of the plan matches no contraction and no parameter. One that matches a parameter may
            be for another method of the model.
        """
        self.plan.check_known([*(site.name for site in self.sites), *(path for path, _ in self.parameters)])
        return self._warned_start()

    def _warned_start(self) -> dict[str, Any]:
        if (
            not self.sparse_sites
            and not self.weights
            and not all(site.dense_by_choice for site in self.sites if site.found.side)
        ):
            reasons = "; ".join(f"{site.name}: {site.reason}" for site in self.sites)
            warnings.warn(f"Nothing is sparse under this plan. {reasons}.", stacklevel=5)
        return self.start()

    @property
    def remembering(self) -> list[Remembers]:
        """Whatever has a name in the memory."""
        return [*self.sites, *([self.outputs] if self.outputs is not None else [])]

    def check_plan(self) -> None:
        """Raise unless every pattern of the plan is of use in this program.

        Raises:
          ValueError: One matches nothing, or can never apply.
        """
        self.plan.check_used([site.name for site in self.sites])

    def run(self, memory: Any) -> Any:
        """Return the function's result, with the sparse backward behind it.

        Raises:
          TypeError: `memory` is not a mapping.
          ValueError: `memory` is of another model, plan or batch.
        """
        check_memory(memory, self.remembering, [path for path, _ in self.parameters])
        placed, states = {}, {}
        for site in self.sparse_sites:
            state, carriers, observer = unwrap(site.name, memory[site.name])
            if site.is_empty or not site.found.moves:
                continue  # no gradient reaches it, so its memory stays
            placed[site.found.place] = Placed(self._rule(site, observer), site.loops)
            states[site.found.place] = SiteState(state, _as_given(site, carriers))
        results = list(map(dense, evaluate(self.jaxpr, self.arguments, placed, states)))
        return self.rebuild(self._entered(results, memory))

    def run_plain(self) -> Any:
        """Return the function's result, with plain JAX's backward but for weights that are sparse."""
        return self.rebuild(list(map(dense, evaluate(self.jaxpr, self.arguments, {}, {}))))

    def _entered(self, results: list[Any], memory: Any) -> list[Any]:
        """Return the results, of the gradient of which something is chosen where it enters."""
        outputs = self.outputs
        if outputs is None or outputs.sparsifier is None or outputs.is_empty:
            return results
        state, carriers, observer = unwrap(outputs.name, memory[outputs.name])
        if observer is not None and observer.kind == "dense":
            return results
        return outputs.chosen_from(results, state, _as_given(outputs, carriers))

    def _rule(self, site: Site, observer: Observer | None) -> Rule:
        assert site.sparsifier is not None
        assert site.operation is not None
        return Rule(
            operation=site.operation,
            side=site.side,
            sparsifier=site.sparsifier,
            name=site.name,
            key=observer.key(site.name) if observer is not None else "",
            observe=observer.kind if observer is not None else "",
            backend=self.backend,
        )


def _as_given(site: Remembers, carriers: list[Carriers] | None) -> list[Carriers] | None:
    if carriers is None:
        return None
    return [narrowed(of_leaf, shape) for of_leaf, shape in zip(carriers, site.weight_shapes, strict=True)]


def trace(
    function: Callable[..., Any],
    plan: Plan,
    backend: str | None,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    label: str = "",
    memory: Any = None,
    states: int = 0,
    first_is_output: bool = False,
) -> Program:
    """Trace `function(params, *args, **kwargs)` and name its sites.

    Arguments that are arrays (or ShapeDtypeStructs) are traced; everything else, such as a flag, is passed as it is. So
    are NumPy scalars and concrete JAX scalars, of which a function may ask whether they are true, as it may without
    `sparse_vjp`; they count as data.

    Args:
      function: What was wrapped.
      plan: Which sparsifier each site gets.
      backend: Which backend runs the products.
      params: Its first argument.
      args: Its other arguments.
      kwargs: Its keyword arguments.
      label: What was wrapped, in words that tell models apart.
      memory: The memory that the program is to run with, if it is.
      states: How many of `args`, from the first on, hold a module's variables.
      first_is_output: Whether the function returns a pair of the model's outputs and what else it changes.

    Raises:
      TypeError: A parameter is not an array, or not of a floating dtype.
      ValueError: There are no parameters, or no contraction with one.
    """
    keyed, params_structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_sparse)
    check_no_states(params)
    leaves = [leaf for _, leaf in keyed]
    values = [leaf.values if isinstance(leaf, SparseWeight) else leaf for leaf in leaves]
    check_parameters([(path, value) for (path, _), value in zip(keyed, values, strict=True)])
    passed = jax.tree.map(_as_number, (args[states:], kwargs))
    rest, rest_structure = jax.tree.flatten(((*args[:states], *passed[0]), passed[1]))
    is_traced = [is_array(leaf) and not _is_concrete_scalar(leaf) for leaf in rest]
    traced = [leaf for leaf, yes in zip(rest, is_traced, strict=True) if yes]
    result_structure: list[Any] = []

    def flat_function(leaves: list[Any], traced: list[Any]) -> list[Any]:
        arrays = iter(traced)
        filled = [next(arrays) if yes else leaf for leaf, yes in zip(rest, is_traced, strict=True)]
        args, kwargs = jax.tree.unflatten(rest_structure, filled)
        result = function(jax.tree.unflatten(params_structure, leaves), *args, **kwargs)
        results, structure = jax.tree.flatten(result)
        fixed = [None if is_array(leaf) else leaf for leaf in results]
        count = len(jax.tree.leaves(result[0])) if first_is_output else len(results)
        is_output = [number < count for number, leaf in enumerate(results) if is_array(leaf)]
        result_structure.append((structure, fixed, [is_array(leaf) for leaf in results], is_output))
        return [leaf for leaf in results if is_array(leaf)]

    with jax.disable_jit(False):  # without jit, loops are unrolled, which changes the sites
        avals = [_dense_type(leaf) if isinstance(leaf, SparseWeight) else leaf for leaf in leaves]
        jaxpr = _compat.make_jaxpr(flat_function, (avals, traced), any_axes=memory is None)
    structure, fixed, are_arrays, is_output = result_structure[-1]

    def rebuild(results: list[Any]) -> Any:
        arrays = iter(results)
        filled = [next(arrays) if array else leaf for array, leaf in zip(are_arrays, fixed, strict=True)]
        return jax.tree.unflatten(structure, filled)

    parameters = [(path_name(path), int(np.prod(leaf.shape))) for path, leaf in keyed]
    moves = _what_moves(memory)
    sources = [Source(frozenset({number}), moves=moves(value)) for number, value in enumerate(values)]
    sources += [dataclasses.replace(DATA, moves=moves(leaf)) for leaf in traced]
    data = {id(leaf) for leaf in rest if is_array(leaf)}
    constants = [
        dataclasses.replace(DATA if id(const) in data else CONSTANT, moves=moves(const)) for const in jaxpr.consts
    ]
    found = discover(jaxpr, sources, constants)
    has_sparse = any(map(is_sparse, leaves))
    if not has_sparse and not any(contraction.side or contraction.sealed for contraction in found):
        names = ", ".join(path for path, _ in parameters)
        raise ValueError(
            f"No contraction has one of the parameters ({names}) on one side, so there is nothing to make sparse. "
            "sparse_vjp works on matrix products and convolutions of a parameter with data, which must be among the "
            "arguments: what a function closes over is a constant."
        )
    sparse = {number: leaf for number, leaf in enumerate(leaves) if isinstance(leaf, SparseWeight)}
    return Program(
        jaxpr=jaxpr,
        arguments=[*leaves, *traced],
        parameters=parameters,
        sites=name_sites(found, parameters, plan, backend),
        weights=sparse,
        outputs=find_outputs(plan, jaxpr.out_avals, is_output, _name_of(function), backend),
        is_output=tuple(is_output),
        states=sum(is_traced[: len(jax.tree.leaves(args[:states]))]),
        rebuild=rebuild,
        plan=plan,
        label=label,
        backend=backend,
    )


def _dense_type(weight: SparseWeight) -> Any:
    """Return shape and dtype of the dense weight; in `shard_map`, where types say more, an array that is dropped."""
    if isinstance(weight.values, _compat.Tracer) and _compat.varies(weight.values):
        return _compat.varying_like(jnp.zeros(weight.shape, weight.dtype), weight.values)
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype)


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _is_concrete_scalar(leaf: Any) -> bool:
    """Whether a leaf is a number whose value a function may ask for."""
    if isinstance(leaf, np.ndarray):  # a float would become a constant of the program instead of data
        return leaf.shape == () and leaf.dtype.kind in "bui"
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, _compat.Tracer)
    return concrete and leaf.shape == () and not _compat.is_key(leaf)


def _as_number(leaf: Any) -> Any:
    """Return a concrete JAX scalar without a fraction as NumPy's, so that what is computed from it can be asked for."""
    if isinstance(leaf, jax.Array) and _is_concrete_scalar(leaf) and leaf.dtype.kind in "bui":
        return np.asarray(leaf)[()]
    return leaf


def _what_moves(memory: Any) -> Callable[[Any], bool]:
    """Return what says whether an array may be differentiated.

    Where the carriers of the memory are seen to be, and nothing stands between their differentiation and here, others
    would be seen to be so as well. Else a `jit`, a loop or a `checkpoint` may hide it, and everything may be.
    """
    seen = [leaf for leaf in jax.tree.leaves(memory) if _compat.under_differentiation(leaf)]
    if seen and _compat.is_made_here(seen[0]):
        return _compat.under_differentiation
    return lambda leaf: True
