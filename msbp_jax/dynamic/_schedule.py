"""The contract of a schedule: when patterns change, and what is asked of variables and state before they do."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from msbp_jax import _compat
from msbp_jax._checks import path_name
from msbp_jax.weights import SPARSITY, Pattern, is_pattern

type DenseGradFn = Callable[[Any], Any]


class SparsityState(NamedTuple):
    """What a schedule carries from step to step: a pytree of arrays, to be saved with the optimizer's state.

    Attributes:
      step: int32 scalar: how many updates there were.
      entries: By path of each weight, int32 scalar: how many numbers its leaf has at this stage. That is how a pattern
        of another stage is told.
      key: Typed PRNG key of a schedule that draws, the same at every step; None of others.
      marks: By path, uint32 scalar: a number made from where the entries stand, 0 for a dense weight. That is how a
        pattern of as many entries is told; a schedule of your own may do without.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> variables = msbp.prune({"params": {"kernel": jnp.ones((3, 4))}}, density=0.25)
      >>> state = msbp.static_sparsity().init(variables)
      >>> int(state.step), {name: int(count) for name, count in state.entries.items()}
      (0, {'kernel': 3})
    """

    step: jax.Array
    entries: dict[str, jax.Array]
    key: jax.Array | None = None
    marks: dict[str, jax.Array] | None = None


class SparsitySchedule(abc.ABC):
    """When the patterns of sparse weights change, and how; made by `rigl`, `gradual_pruning` and such.

        state = schedule.init(variables)
        variables, opt_state, state = schedule.update(tx, variables, opt_state, state, dense_grad_fn)

    A schedule of your own is a subclass with the three methods that are abstract here.

    Attributes:
      changes_shapes: Whether an update changes shapes, and so runs outside of `jit`, after the compiled step; others
        belong inside it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, msbp_jax as msbp
      >>> variables = msbp.prune({"params": {"kernel": jnp.ones((3, 4))}}, density=0.25)
      >>> tx = optax.adam(1e-3)
      >>> opt_state = tx.init(variables["params"])
      >>> schedule = msbp.sparse_evolution(every=1, fraction=0.5)
      >>> state = schedule.init(variables, jax.random.key(0))
      >>> variables, opt_state, state = schedule.update(tx, variables, opt_state, state)
      >>> sorted(variables["params"]["kernel"].tolist())  # one of three was dropped, and a new one begins at 0
      [0.0, 1.0, 1.0]
    """

    changes_shapes: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, variables: Mapping[str, Any], key: jax.Array | None = None) -> SparsityState:
        """Return the state before the first step.

        Args:
          variables: With "params" and "sparsity", as `msbp.prune` returns them.
          key: Typed PRNG key, of a schedule that draws.

        Raises:
          ValueError: Variables that the schedule cannot change, a missing key, or one that nothing is drawn with.
        """

    @abc.abstractmethod
    def due(self, state: SparsityState) -> Any:
        """Return whether the next `update` changes patterns: a bool, or a traced one of a traced state."""

    @abc.abstractmethod
    def update(
        self,
        tx: Any,
        variables: Mapping[str, Any],
        opt_state: Any,
        state: SparsityState,
        dense_grad_fn: DenseGradFn | None = None,
    ) -> tuple[dict[str, Any], Any, SparsityState]:
        """Count a step; if it is due, return variables of other patterns and an optimizer's state that has followed.

        Args:
          tx: The optimizer whose state this is.
          variables: With "params" and "sparsity", after the optimizer's update.
          opt_state: The optimizer's state.
          state: Of the last update, or of `init`.
          dense_grad_fn: `f(dense_params) -> dense_grads`, where the schedule asks for it; called at steps that are due
            alone, with what `msbp.densify` makes of the parameters.

        Returns:
          Variables, the optimizer's state and the state of the schedule. Weights that stay keep their values and their
          moments, to the bit; both are 0 of new ones.

        Raises:
          ValueError: Variables, pattern or state of another stage, or an optimizer that holds something that cannot
            follow.
        """

    def like(self, variables: Mapping[str, Any], state: SparsityState) -> dict[str, Any]:
        """Return shapes and dtypes of the variables that a state is of: what a checkpoint is restored into.

        The state is restored first; its own shapes are those of `init`.

        Args:
          variables: As training began with; their numbers do not matter.
          state: Of the schedule.
        """
        del state
        found: dict[str, Any] = shapes(dict(variables))
        return found

    def check(self, variables: Mapping[str, Any], state: SparsityState) -> None:
        """Raise unless variables and state are of one stage; for what was restored, outside of `jit`.

        Args:
          variables: With "params" and "sparsity".
          state: Of the schedule.

        Raises:
          ValueError: They are of different stages, or of different models.
        """
        self._check_sizes(variables, state)
        marks = state.marks or {}
        if any(isinstance(leaf, _compat.Tracer) for leaf in jax.tree.leaves((variables.get(SPARSITY), marks))):
            return
        for name, own in marks_of(variables, marks).items():
            if int(own) != int(marks[name]):
                raise ValueError(
                    f"The entries of {name} stand in other places than those that the state at step {int(state.step)} "
                    "is of. Restore variables, optimizer's state and this state of one and the same step."
                )

    def _check_sizes(self, variables: Mapping[str, Any], state: SparsityState) -> None:
        """Raise unless weights have as many entries as the state is of: at every update, as it costs nothing."""
        sizes = sizes_of(variables, state.entries)
        if any(isinstance(count, _compat.Tracer) for count in (state.step, *state.entries.values())):
            return  # numbers that are not known yet; the sizes of arrays agree, or tracing has raised
        for name, size in sizes.items():
            if size != (expected := int(state.entries[name])):
                raise ValueError(
                    f"The pattern of {name} has {size} entries, and the state at step {int(state.step)} is of a stage "
                    f"with {expected}. Restore variables, optimizer's state and this state of one and the same step."
                )


def marks_of(variables: Mapping[str, Any], names: Any) -> dict[str, jax.Array]:
    """Return a number made from where the entries of each weight stand; 0 for a dense one."""
    patterns = patterns_of(variables)
    return {name: mark(patterns[name]) if name in patterns else jnp.zeros((), jnp.uint32) for name in names}


@jax.jit
def mark(pattern: Pattern) -> UInt32[Array, ""]:
    """Return a hash of a pattern: sums of places, each mixed with its number, so that an exchange of two shows."""

    def mixed(numbers: jax.Array) -> jax.Array:
        flat = numbers.ravel().astype(jnp.uint32)
        h = (flat ^ (jnp.arange(flat.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
        return ((h ^ (h >> 15)) * jnp.uint32(0xC2B2AE35)).sum(dtype=jnp.uint32)

    return mixed(pattern.inputs) + jnp.uint32(31) * mixed(pattern.starts)


def patterns_of(variables: Mapping[str, Any]) -> dict[str, Pattern]:
    """Return the patterns of variables by path."""
    found = jax.tree_util.tree_flatten_with_path(variables.get(SPARSITY, {}), is_leaf=is_pattern)[0]
    if wrong := [path_name(path) for path, node in found if not is_pattern(node)]:
        raise ValueError(
            f"The sparsity of {wrong[0]} is not a pattern. From a checkpoint patterns are restored with a target, such "
            "as the variables that msbp.prune made at first."
        )
    return {path_name(path): pattern for path, pattern in found}


def shapes(tree: Any) -> Any:
    """Return a pytree of arrays as shapes and dtypes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype), tree)


def leaves_of(params: Any) -> dict[str, Any]:
    """Return the leaves of parameters by path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def with_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """Return parameters with these leaves in place of those of the same path."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(path_name(path), leaf), params)


def with_new_patterns(patterns: Any, new: Mapping[str, Pattern]) -> Any:
    """Return the collection "sparsity" with these patterns in place of those of the same path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, old: new.get(path_name(path), old), patterns, is_leaf=is_pattern
    )


def sizes_of(variables: Mapping[str, Any], names: Any) -> dict[str, int]:
    """Return how many numbers the leaf of each weight has.

    Raises:
      ValueError: There is no such weight, or its pattern is of another length.
    """
    leaves, patterns = leaves_of(check_variables(variables)["params"]), patterns_of(variables)
    if missing := [name for name in names if name not in leaves]:
        raise ValueError(f"The state is of the weight {missing[0]}, and the parameters are {', '.join(leaves)}.")
    for name in names:
        shape = tuple(np.shape(leaves[name]))
        if name in patterns and tuple(patterns[name].inputs.shape) != shape:
            raise ValueError(
                f"The parameter {name} has shape {shape}, and its pattern is of {tuple(patterns[name].inputs.shape)} "
                "entries. Restore both of one and the same step."
            )
    return {name: int(np.size(leaves[name])) for name in names}


def check_variables(variables: Any) -> Mapping[str, Any]:
    """Return variables, or raise unless they have parameters."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f'A schedule takes variables with "params" and "{SPARSITY}", as msbp.prune returns them; got {got}.'
        )
    return variables


def started(variables: Mapping[str, Any], key: jax.Array | None, *, draws: str | None = None) -> SparsityState:
    """Return the state before the first step, of weights that are sparse already.

    Args:
      variables: With "params" and "sparsity".
      key: As the user gave it.
      draws: Name of the schedule if it draws; None if it does not, and takes no key.

    Raises:
      ValueError: No weight is sparse, or there is no key, or one too many.
    """
    check_key(key, draws)
    patterns = patterns_of(check_variables(variables))
    if not patterns:
        raise ValueError(
            f'None of the weights is sparse: "{SPARSITY}" is missing or empty. Prune first, for example by '
            'msbp.prune(variables, density=0.1, method="random", scope="erdos_renyi", key=jax.random.key(0)).'
        )
    counts = {name: jnp.asarray(size, jnp.int32) for name, size in sizes_of(variables, patterns).items()}
    return SparsityState(jnp.zeros((), jnp.int32), counts, key, marks_of(variables, patterns))


def check_still_sparse(variables: Mapping[str, Any], state: SparsityState) -> None:
    """Raise unless all weights that a state is of are sparse."""
    patterns = patterns_of(variables)
    if dense := [name for name in state.entries if name not in patterns]:
        raise ValueError(
            f'{dense[0]} has no pattern in "{SPARSITY}", and the state is of one that has. '
            'Pass "sparsity" along with "params", as msbp.prune returned both.'
        )


def check_key(key: Any, draws: str | None) -> None:
    """Raise unless there is a typed key just where something is drawn."""
    if draws is None and key is not None:
        raise ValueError("This schedule draws nothing, and takes no key.")
    if draws is not None and key is None:
        raise ValueError(f"{draws} draws at random and needs a key: schedule.init(variables, jax.random.key(0)).")
    if key is not None and not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be a typed PRNG key, jax.random.key(0), got {key!r}.")
