"""The adapter for functions `f(params, *args)`; the other adapters are built on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from msbp_jax import _compat
from msbp_jax.carriers import Carried, opened, with_memory, without_memory
from msbp_jax.sparsifiers._base import State
from msbp_jax.transform._asked import NOT_GIVEN, Asked, NotGiven, checked
from msbp_jax.transform._make_report import make_report
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._program import Program, trace
from msbp_jax.transform._report import Report
from msbp_jax.transform._shares import is_concrete
from msbp_jax.weights import is_sparse


class SparseFunction:
    """A function whose contractions with a parameter have a sparse backward; made by `sparse_vjp`.

    Attributes:
      function: The function that was wrapped.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        plan: Plan,
        backend: str | None,
        memory_name: str = "memory",
        label: str = "",
        states: int = 0,
        first_is_output: bool = False,
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self._memory_name = memory_name
        self._label = label or f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        self._plan = plan
        self._backend = backend
        self._first_is_output = first_is_output  # of what it returns: the rest are collections that it changes
        self._states = states  # how many arguments hold a module's variables, and not what its user passes

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `f(params, *args, **kwargs)`; with `memory=`, its derivative is the sparse one.

        Args:
          params: A pytree of arrays: what is differentiated. Arrays without fractions are constants. Or what
            `with_memory` returned, which has the memory in it.
          *args: Anything else. Arrays are data, other leaves (flags) are passed as they are.
          **kwargs: As `*args`; and `memory`, what `init_memory` or the last step returned. Without it the call is the
            plain function, for evaluation, unless no sparsifier of the plan has a state: then there is nothing to
            carry, and the derivative is the sparse one anyway. It has another name if `sparse_vjp` was given one.

        Raises:
          TypeError: A parameter is not a floating array, or `memory` not a mapping.
          ValueError: `memory` is missing where the call is seen to be differentiated, or of another model, plan or
            batch, or given twice; there are no parameters.
        """
        memory = kwargs.pop(self._memory_name, None)
        params, carried = _without_memory(params)
        if carried is not None:
            if memory is not None:
                raise given_twice(self._name(), self._memory_name)
            memory = carried
        if isinstance(memory, Carried):
            program = self._program(params, args, kwargs, memory.tree)
            return program.run(opened(memory, program.start()))
        if memory is not None or not self._plan.has_state:
            program = self._program(params, args, kwargs, memory)
            return program.run(program.empty_memory() if memory is None else memory)
        leaves = jax.tree.leaves((params, args, kwargs))
        if any(_compat.under_differentiation(leaf) for leaf in leaves) and self._is_sparse(params, args, kwargs):
            raise ValueError(
                f"{self._name()} is differentiated without its memory, which would be a dense backward. Pass "
                f"{self._memory_name}=..., as init_memory returned it, or differentiate the plain function."
            )
        if any(map(is_sparse, jax.tree.leaves(params, is_leaf=is_sparse))):
            return self._program(params, args, kwargs).run_plain()
        return self.function(params, *args, **kwargs)

    def init_memory(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, State]:
        """Return the memory at the start, without running the function.

        Args:
          params: As in a call; ShapeDtypeStructs will do.
          *args: As in a call; ShapeDtypeStructs will do.
          **kwargs: As in a call; ShapeDtypeStructs will do.

        Returns:
          A dict from site names to the state of their sparsifier: a plain pytree of arrays.

        Raises:
          TypeError: A parameter is not a floating array.
          ValueError: There are no parameters, no contraction with one, or a pattern of the plan matches nothing.
        """
        params, _ = _without_memory(params)
        return self._program(params, args, kwargs).init_memory()

    def with_memory(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return parameters and a memory at its start as one pytree, the gradient of which has the new memory.

        A call takes it in place of the parameters, and needs no `memory=`. It is differentiated as a whole, by
        `jax.grad` or anything else. Of the collection `"_overwrite_with_gradient"`, where the memory stands, the
        gradient is the next value: Flax's `TrainState` overwrites it, and its optimizer does not see it.

        Args:
          params: As in a call.
          *args: As in a call; ShapeDtypeStructs will do.
          **kwargs: As in a call; ShapeDtypeStructs will do.

        Raises:
          TypeError: A parameter is not a floating array.
          ValueError: There are no parameters, no contraction with one, or a pattern of the plan matches nothing.
        """
        return with_memory(params, {}, self.init_memory(params, *args, **kwargs))

    def report(
        self,
        params: Any,
        *args: Any,
        optimizer: optax.GradientTransformation | optax.MultiSteps | NotGiven | None = NOT_GIVEN,
        share: float | NotGiven | None = NOT_GIVEN,
        measure: bool | NotGiven = NOT_GIVEN,
        **kwargs: Any,
    ) -> Report:
        """Return what a step is expected to gain, what is sparse, and what stays dense, and why; `print` it.

        Args:
          params: As in a call; ShapeDtypeStructs will do.
          *args: As in a call; ShapeDtypeStructs will do.
          optimizer: One of Optax, whose update then belongs to the step; None to leave it out.
          share: Share of the rows or entries that is kept, in (0, 1], where only the run tells; None to read it from
            the memory or, without one, to count with nothing left out.
          measure: Whether to time steps, plain and sparse, and variants of the plan, on this machine: some ten
            seconds, and compilation. Needs arrays.
          **kwargs: As in a call; ShapeDtypeStructs will do. `memory` too: its running means say how much is kept.
            What the function itself calls `optimizer`, `share` or `measure` is to be passed by position; by **kwargs it
            does not get them.

        Raises:
          TypeError: A parameter is not a floating array; an option is of the wrong type, or also the name of an
            argument of the function.
          ValueError: There are no parameters, no contraction with one, or a pattern of the plan matches nothing;
            `share` is out of range; steps are to be timed, and arguments are shapes.
        """
        asked = checked(self.function, self._name(), optimizer=optimizer, share=share, measure=measure)
        memory = kwargs.pop(self._memory_name, None)
        params, carried = _without_memory(params)
        return self.described(params, args, kwargs, asked, memory if carried is None else carried)

    def described(
        self, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Asked, memory: Any
    ) -> Report:
        """Return the report of a call; what was asked for is checked."""
        program = self._program(params, args, kwargs)
        if isinstance(memory, Carried):
            concrete = all(map(is_concrete, jax.tree.leaves(memory.tree)))
            memory = opened(memory, program.start()) if concrete else None
        return make_report(program, params, asked, memory)

    def __repr__(self) -> str:
        """Return the wrapped function and the plan."""
        entries = ", ".join(f"{pattern!r}: {sparsifier}" for pattern, sparsifier in self._plan.entries)
        return f"sparse_vjp({self._name()}, {{{entries}}})"

    def _program(self, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any], memory: Any = None) -> Program:
        return trace(
            self.function,
            self._plan,
            self._backend,
            params,
            args,
            kwargs,
            label=self._label,
            memory=memory,
            states=self._states,
            first_is_output=self._first_is_output,
        )

    def _is_sparse(self, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._program(params, args, kwargs).is_sparse

    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def _without_memory(params: Any) -> tuple[Any, Carried | None]:
    rest, carried = without_memory(params)
    return (rest["params"] if carried is not None else params), carried


def given_twice(name: str, memory_name: str) -> ValueError:
    """Return the error of a call that gets two memories."""
    return ValueError(
        f"{name} is given two memories, one by {memory_name}= and one among its parameters (with_memory). Leave one "
        "of them out."
    )
