"""The adapter for Flax NNX modules: a module that is called as before, with its memory in Variables of their own.

A call is traced like a function of the module's Variables, and of those of every graph node among its arguments (an
`nnx.Rngs`). Whatever it writes there arrives, of whatever type, new Variables and plain attributes too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from msbp_jax import _compat
from msbp_jax.carriers import Marked, is_marked
from msbp_jax.sparsifiers._base import State
from msbp_jax.transform._asked import NOT_GIVEN, NotGiven, checked
from msbp_jax.transform._function import SparseFunction
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._report import Report

NNXModule = nnx.Module


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


class Carrier(Memory):
    """The Variable beside a `Memory` by which its new value leaves `value_and_grad`; there for that time only."""


class SparseNNXModule(nnx.Module):
    """An NNX module whose contractions with a parameter have a sparse backward; made by `sparse_vjp`.

    Attributes:
      module: The module that was wrapped.
      memory: A `Memory` for each sparse site, by its name; None before `init_memory`.
      carriers: A `Carrier` for each, while `msbp.nnx.value_and_grad` differentiates; else None.
    """

    def __init__(self, module: nnx.Module, plan: Plan, backend: str | None) -> None:
        self.module = module
        self.memory: dict[str, Memory] | None = nnx.data(None)
        self.carriers: dict[str, Carrier] | None = nnx.data(None)
        self._plan = plan
        self._backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain module returns; once there is a memory, its derivative is the sparse one.

        Under `msbp.nnx.value_and_grad` the memory takes on its new value; under `nnx.grad` it stays as it was, with a
        warning. Other Variables (batch statistics, counts of random numbers, whatever a call writes) change as they do
        in the plain module, those of an `nnx.Rngs` among the arguments too. For evaluation `model.module(...)`, the
        plain module, returns the same and is never traced.

        Args:
          *args: Arguments of the module.
          **kwargs: Keyword arguments of the module.

        Raises:
          ValueError: It is seen to be differentiated before `init_memory` was called, or the memory is of other shapes.
        """
        return self._run("__call__", *args, **kwargs)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.memory is None and self._plan.has_state and self._is_plain:
            self._check_not_differentiated((nnx.state(self.module), args, kwargs))
            return getattr(self.module, method)(*args, **kwargs)
        call = _Call(self.module, args, kwargs, method)
        variables = {} if self.memory is None else self.memory
        memory = {name: self._marked(name, variable, (args, kwargs)) for name, variable in variables.items()}
        with nnx.update_context(_TAG):
            params, rest, arrays = call.split()
            result = self._function(call)(
                self._given(params), rest, *arrays, memory=None if self.memory is None else memory
            )
            return call.merged(result)

    def __getattr__(self, name: str) -> Any:
        module = vars(self).get("module")
        if module is None:  # before __init__ has run, or while a copy is made
            raise AttributeError(name)
        if not name.startswith("_") and inspect.isfunction(getattr(type(module), name, None)):
            return functools.partial(self._run, name)
        if name in ("apply", "init"):
            raise AttributeError(
                f"{type(self.module).__name__} is an NNX module and has no {name}: call it as model(*args), after "
                "model.init_memory(*args); train it with msbp.nnx.value_and_grad."
            )
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}; the plain module is its .module."
        )

    def init_memory(self, *args: Any, method: str = "__call__", **kwargs: Any) -> dict[str, State]:
        """Make the memory for arguments of these shapes, in place of the one there is; nothing is run.

        Args:
          *args: As in a call; ShapeDtypeStructs will do.
          method: Name of the module's method that is called. It should reach all that is trained.
          **kwargs: As in a call; ShapeDtypeStructs will do.

        Returns:
          What the Variables now hold: a dict from site names to the state of their sparsifier.

        Raises:
          ValueError: There is no contraction with a parameter, or a pattern of the plan matches nothing.
        """
        call = _Call(self.module, args, kwargs, method)
        with nnx.update_context(_TAG), self._explained(args):
            params, rest, arrays = call.split()
            memory = self._function(call).init_memory(self._given(params), rest, *arrays)
        self.memory = nnx.data({name: Memory(state) for name, state in memory.items()})
        return memory

    def report(
        self,
        *args: Any,
        method: str = "__call__",
        optimizer: optax.GradientTransformation | optax.MultiSteps | NotGiven | None = NOT_GIVEN,
        share: float | NotGiven | None = NOT_GIVEN,
        measure: bool | NotGiven = NOT_GIVEN,
        **kwargs: Any,
    ) -> Report:
        """Return what a step is expected to gain, what is sparse, and what stays dense, and why; `print` it.

        Args:
          *args: As in a call; ShapeDtypeStructs will do.
          method: Name of the module's method that is called.
          optimizer: One of Optax, whose update then belongs to the step; None to leave it out.
          share: Share of the rows or entries that is kept, in (0, 1], where only the run tells; None to read it from
            the module's memory or, without one, to count with nothing left out.
          measure: Whether to time steps, plain and sparse, and variants of the plan, on this machine: some ten
            seconds, and compilation. Needs arrays.
          **kwargs: As in a call; ShapeDtypeStructs will do. What the module itself calls `optimizer`, `share` or
            `measure` is to be passed by position; what it takes by **kwargs of its own does not reach it under these
            names.

        Raises:
          TypeError: An option is of the wrong type, or also the name of an argument of the module.
          ValueError: There is no contraction with a parameter, or a pattern of the plan matches nothing; `share` is out
            of range; steps are to be timed, and arguments are shapes.
        """
        target, name = getattr(self.module, method, self.module), type(self.module).__name__
        asked = checked(target, name, optimizer=optimizer, share=share, measure=measure)
        call = _Call(self.module, args, kwargs, method)
        memory = None if self.memory is None else {name: state.get_value() for name, state in self.memory.items()}
        with nnx.update_context(_TAG), self._explained(args):
            params, rest, arrays = call.split()
            return self._function(call).described(self._given(params), (rest, *arrays), {}, asked, memory)

    def _given(self, params: Any) -> Any:
        """Return the parameters that the module is called with."""
        return params

    @property
    def _is_plain(self) -> bool:
        """Whether without a memory it is the plain module."""
        return True

    @contextlib.contextmanager
    def _explained(self, args: tuple[Any, ...]) -> Iterator[None]:
        """Say what to do where a call fails that looks like one of a Linen module."""
        try:
            yield
        except Exception as error:
            if args and isinstance(args[0], Mapping) and "params" in args[0]:
                raise TypeError(
                    f"{type(self.module).__name__} is an NNX module, which holds its variables: pass init_memory and "
                    "report the arguments of a call alone, model.init_memory(*args)."
                ) from error
            raise

    def _marked(self, name: str, variable: Memory, arguments: Any) -> State:
        if self.carriers is not None:
            return Marked.tree(variable.get_value(), self.carriers[name].get_value())
        leaves = jax.tree.leaves((nnx.state(self.module, nnx.Param), arguments))
        remembers = bool(jax.tree.leaves(variable.get_value())) and not is_marked(variable.get_value())
        if remembers and any(_compat.under_differentiation(leaf) for leaf in leaves):
            warnings.warn(
                f"{type(self.module).__name__} is differentiated by something else than msbp.nnx.value_and_grad: its "
                "gradients are sparse, and its memory stays as it is. Train with msbp.nnx.value_and_grad(loss_fn)"
                "(model, ...), which updates it; for dense gradients, or to silence this, call model.module.",
                stacklevel=3,
            )
        return variable.get_value()

    def _function(self, call: _Call) -> SparseFunction:
        label = type(self.module).__qualname__
        return SparseFunction(call, self._plan, self._backend, label=label, states=1, first_is_output=True)

    def _check_not_differentiated(self, tree: Any) -> None:
        if any(_compat.under_differentiation(leaf) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"{type(self.module).__name__} is differentiated before it has a memory, which would be a dense "
                "backward. Call model.init_memory(*arguments), with arguments of the batch's shapes, first."
            )


_TAG = "msbp_jax"


class Arguments:
    """Arguments of a call, with the graph nodes among them (an `nnx.Rngs`, a module) apart from everything else.

    Attributes:
      nodes: The graph nodes.
      others: A list of the other leaves, None in place of the nodes.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
        self._is_node = [_is_node(leaf) for leaf in leaves]
        self.nodes = [leaf for leaf in leaves if _is_node(leaf)]
        self.others = [None if _is_node(leaf) else leaf for leaf in leaves]

    def put_together(self, nodes: Sequence[Any], others: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments and keyword arguments with these nodes and other leaves."""
        remaining = iter(nodes)
        leaves = [next(remaining) if yes else leaf for leaf, yes in zip(others, self._is_node, strict=True)]
        args, kwargs = jax.tree.unflatten(self._structure, leaves)
        return args, kwargs


class _Call:
    """A call of a module as a pure function `(params, rest, args, kwargs) -> (result, what was written)`.

    Args:
      module: The module.
      args: Its arguments; graph nodes among them are taken out and count as state.
      kwargs: Its keyword arguments, as `args`.
      method: Name of its method that is called.
    """

    def __init__(self, module: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], method: str) -> None:
        self.method = method
        self.arguments = Arguments(args, kwargs)
        self.objects = (module, self.arguments.nodes)
        self.graphdefs: list[Any] = []
        self.__name__ = self.__qualname__ = type(module).__name__

    def split(self) -> tuple[Any, Any, tuple[Any, ...]]:
        """Return the module's parameters, all other state, and the arguments that are no graph nodes."""
        is_param = nnx.filterlib.to_predicate(nnx.Param)
        is_module_param = lambda path, value: path[0] == 0 and is_param(path, value)
        with nnx.split_context(_TAG) as context:
            self.graphdef, params, rest = context.split(self.objects, is_module_param, ...)
        return params.get(0, nnx.State({})), rest, (self.arguments.others,)

    def __call__(self, params: Any, rest: Any, others: list[Any]) -> tuple[Any, Any]:
        """Run the module on copies."""
        with nnx.merge_context(_TAG, inner=True) as context:
            objects = context.merge(self.graphdef, nnx.State({0: params}), rest)
        module, nodes = objects
        before, described = _values(objects), nnx.graphdef(objects)
        args, kwargs = self.arguments.put_together(nodes, others)
        result = getattr(module, self.method)(*args, **kwargs)
        after = _values(objects)
        with nnx.split_context(_TAG) as context:
            graphdef, state = context.split(objects)
        unchanged = after.keys() == before.keys() and all(after[path] is before[path] for path in after)
        self.graphdefs = [] if unchanged and nnx.graphdef(objects) == described else [graphdef]
        return result, state if self.graphdefs else None

    def merged(self, result: tuple[Any, Any]) -> Any:
        """Write what the copies have become to the module and the arguments; return the module's result."""
        value, state = result
        if self.graphdefs:
            with nnx.merge_context(_TAG, inner=False) as context:
                context.merge(self.graphdefs[0], state)
        return value


def _values(objects: Any) -> dict[Any, Any]:
    flat = nnx.to_flat_state(nnx.state(objects))
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def is_nnx(target: Any) -> bool:
    """Whether `target` is an NNX module."""
    return isinstance(target, nnx.Module)
