"""The adapter for Flax Linen modules: `init` is the module's, `apply` takes a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.core.scope import Scope

from msbp_jax import _compat
from msbp_jax.carriers import OVERWRITE_WITH_GRADIENT, Carried, with_memory, without_memory
from msbp_jax.sparsifiers._base import State
from msbp_jax.transform._asked import NOT_GIVEN, NotGiven, checked
from msbp_jax.transform._function import SparseFunction, given_twice
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._report import Report

LinenModule = nn.Module


class SparseModule:
    """A Linen module whose contractions with a parameter have a sparse backward; made by `sparse_vjp`.

    Attributes:
      module: The module that was wrapped.
    """

    def __init__(self, module: nn.Module, plan: Plan, backend: str | None, memory_name: str = "memory") -> None:
        self.module = module
        self._plan = plan
        self._backend = backend
        self._memory_name = memory_name

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the plain module's `init` returns."""
        return self.module.init(*args, **kwargs)

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the plain module's `init_with_output` returns."""
        return self.module.init_with_output(*args, **kwargs)

    def lazy_init(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the plain module's `lazy_init` returns."""
        return self.module.lazy_init(*args, **kwargs)

    def tabulate(self, *args: Any, **kwargs: Any) -> str:
        """Return exactly what the plain module's `tabulate` returns."""
        return self.module.tabulate(*args, **kwargs)

    def bind(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> nn.Module:
        """Return the plain module, bound to its variables, for evaluation.

        Args:
          variables: As in `apply`.
          *args: As in the plain module's `bind`.
          **kwargs: As in the plain module's `bind`.

        Raises:
          ValueError: The variables are seen to be differentiated: what is bound has the dense backward.
        """
        self._check_not_differentiated(variables)
        params, others, _ = _split(variables)
        return self.module.bind({"params": params, **others}, *args, **kwargs)

    def clone(self, *, parent: Any = None, **kwargs: Any) -> Any:
        """Return a wrapped copy of the module with other fields; within a scope (`nn.apply`), a plain one of its own.

        Args:
          parent: As in the plain module's `clone`.
          **kwargs: Fields to replace.

        Raises:
          ValueError: The variables of the scope are seen to be differentiated.
        """
        if parent is None:
            return SparseModule(self.module.clone(**kwargs), self._plan, self._backend, self._memory_name)
        if isinstance(parent, Scope):
            self._check_not_differentiated(parent.variables())
        return self.module.clone(parent=parent, **kwargs)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the plain module's `apply` returns; with `memory=`, its derivative is the sparse one.

        Args:
          variables: The module's variables; the collection "params" is what is differentiated. With what
            `with_memory` returned among them, or as their "params", the memory is there, and `memory=` is not needed.
          *args: Arguments of the module.
          **kwargs: Further arguments, `rngs`, `mutable`, `method` and `capture_intermediates` included; and `memory`,
            what `init_memory` or the last step returned. Without it the call is the plain module's, for evaluation,
            unless no sparsifier of the plan has a state: then the derivative is the sparse one anyway. It has another
            name if `sparse_vjp` was given one.

        Raises:
          TypeError: A parameter is not an array, or `memory` not a mapping.
          ValueError: `memory` is missing where the call is seen to be differentiated, or of another model, plan or
            batch, or given twice; `variables` have no parameters.
        """
        params, others, carried = _split(variables)
        memory = {name: kwargs.pop(name) for name in (self._memory_name,) if name in kwargs}
        if carried is not None:
            if memory.get(self._memory_name) is not None:
                raise given_twice(type(self.module).__name__, self._memory_name)
            memory = {self._memory_name: carried}
        return self._function(kwargs)(params, others, args, _traced(kwargs), **memory)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say how a Linen module is called.

        Raises:
          TypeError: Always.
        """
        del args, kwargs
        raise TypeError(
            f"{type(self.module).__name__} is a Linen module: call it as model.apply(variables, *args, memory=memory), "
            "after variables = model.init(key, *args) and memory = model.init_memory(variables, *args)."
        )

    def init_memory(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, State]:
        """Return the memory at the start, without running the module.

        Args:
          variables: As in `apply`; ShapeDtypeStructs will do.
          *args: As in `apply`; ShapeDtypeStructs will do.
          **kwargs: As in `apply`; ShapeDtypeStructs will do.

        Returns:
          A dict from site names to the state of their sparsifier: a plain pytree of arrays.

        Raises:
          TypeError: A parameter is not a floating array.
          ValueError: `variables` have no parameters, or a pattern of the plan matches nothing.
        """
        params, others, _ = _split(variables)
        return self._function(kwargs).init_memory(params, others, args, _traced(kwargs))

    def with_memory(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return parameters and a memory at its start as one pytree, the gradient of which has the new memory.

            params = model.with_memory(variables, x)      {"params": ..., "_overwrite_with_gradient": ...}

        Flax's own `TrainState.create(params=params, ...)` carries it, and `state.apply_gradients` renews it: of that
        collection the "gradient" is the next value, and no optimizer sees it. Differentiate all of `params` by
        `jax.value_and_grad`; call the model as `model.apply({**params, ...}, x)` or `({"params": params, ...}, x)`.

        What happens to all gradients alike (a mean over devices or microbatches, a division by the loss scale) leaves
        the memory right. A penalty on parameters must leave this collection out.

        Args:
          variables: As in `apply`; other collections than the parameters are left out of the result.
          *args: As in `apply`; ShapeDtypeStructs will do.
          **kwargs: As in `apply`; ShapeDtypeStructs will do.

        Raises:
          TypeError: A parameter is not a floating array.
          ValueError: `variables` have no parameters, or a pattern of the plan matches nothing.
        """
        params, others, _ = _split(variables)
        memory = self.init_memory(variables, *args, **kwargs)
        return with_memory(params, others.get(OVERWRITE_WITH_GRADIENT, {}), memory)

    def report(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        optimizer: optax.GradientTransformation | optax.MultiSteps | NotGiven | None = NOT_GIVEN,
        share: float | NotGiven | None = NOT_GIVEN,
        measure: bool | NotGiven = NOT_GIVEN,
        **kwargs: Any,
    ) -> Report:
        """Return what a step is expected to gain, what is sparse, and what stays dense, and why; `print` it.

        Args:
          variables: As in `apply`; ShapeDtypeStructs will do.
          *args: As in `apply`; ShapeDtypeStructs will do.
          optimizer: One of Optax, whose update then belongs to the step; None to leave it out.
          share: Share of the rows or entries that is kept, in (0, 1], where only the run tells; None to read it from
            the memory or, without one, to count with nothing left out.
          measure: Whether to time steps, plain and sparse, and variants of the plan, on this machine: some ten
            seconds, and compilation. Needs arrays.
          **kwargs: As in `apply`; ShapeDtypeStructs will do. `memory` too: its running means say how much is kept.
            What the module itself calls `optimizer`, `share` or `measure` is to be passed by position; by **kwargs it
            does not get them.

        Raises:
          TypeError: A parameter is not a floating array; an option is of the wrong type, or also the name of an
            argument of the module.
          ValueError: `variables` have no parameters, or a pattern of the plan matches nothing; `share` is out of
            range; steps are to be timed, and arguments are shapes.
        """
        target, name = _called(self.module, kwargs.get("method")), type(self.module).__name__
        asked = checked(target, name, optimizer=optimizer, share=share, measure=measure)
        params, others, carried = _split(variables)
        memory = kwargs.pop(self._memory_name, None)
        call = others, args, _traced(kwargs)
        return self._function(kwargs).described(params, call, {}, asked, memory if carried is None else carried)

    def __repr__(self) -> str:
        """Return the wrapped module and the plan."""
        entries = ", ".join(f"{pattern!r}: {sparsifier}" for pattern, sparsifier in self._plan.entries)
        return f"sparse_vjp({type(self.module).__name__}, {{{entries}}})"

    def _function(self, kwargs: Mapping[str, Any]) -> SparseFunction:
        options = {name: value for name, value in kwargs.items() if name in _OPTIONS}

        def apply(params: Any, others: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.module.apply({"params": params, **others}, *args, **options, **kwargs)

        apply.__name__ = type(self.module).__name__
        return SparseFunction(
            apply,
            self._plan,
            self._backend,
            self._memory_name,
            repr(self.module),
            states=1,
            first_is_output=kwargs.get("mutable", False) is not False,
        )

    def _check_not_differentiated(self, variables: Any) -> None:
        if any(_compat.under_differentiation(leaf) for leaf in jax.tree.leaves(variables)):
            raise ValueError(
                f"{type(self.module).__name__} is bound to variables that are differentiated, and its backward "
                f"would be dense. Train with model.apply(variables, ..., {self._memory_name}=memory), which takes "
                "method= for another method, or a function of the module."
            )


# Arguments of `apply` that say how to apply; they are no pytrees of arrays.
_OPTIONS = frozenset({"method", "mutable", "capture_intermediates"})


def _traced(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _OPTIONS}


def _split(variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Carried | None]:
    """Return the parameters, the other collections, and the memory that stands among them, if one does."""
    if not isinstance(variables, Mapping) or "params" not in variables or not jax.tree.leaves(variables["params"]):
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            'The first argument must be the module\'s variables with parameters in the collection "params", as in '
            f'{{"params": params}}; got {got}.'
        )
    params = variables["params"]
    if isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params:  # as in Flax's TrainState
        variables = {**variables, **params}
    rest, carried = without_memory(variables)
    return rest["params"], {name: tree for name, tree in rest.items() if name != "params"}, carried


def _called(module: nn.Module, method: Any) -> Any:
    """Return the method of a module that a call runs."""
    if callable(method):
        return method
    return getattr(module, "__call__" if method is None else str(method), module)


def is_linen(target: Any) -> bool:
    """Whether `target` is a Linen module."""
    return isinstance(target, nn.Module)
