"""Training of NNX models: gradients out, and the memory updated where it lives, in `msbp.Memory` Variables.

It is `nnx.value_and_grad` with the carriers of the memory (`carriers/`) as further Variables to
differentiate: so whatever a loss writes to its arguments arrives as it does there, and what NNX refuses is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from msbp_jax import training
from msbp_jax.carriers import Passage
from msbp_jax.kernels.xla.schedule import all_at_once
from msbp_jax.training._microbatches import Step, check_microbatches, in_microbatches
from msbp_jax.training._value_and_grad import check_loss, check_result
from msbp_jax.transform import Memory, SparseNNXModule
from msbp_jax.transform._nnx import Arguments, Carrier


def value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, microbatches: int | None = None, wrt: Any = nnx.Param
) -> Callable[..., Any]:
    """Turn a loss of a model into a function that returns its value and gradients, and updates the model's memory.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)`, returning a real scalar, or `(scalar, aux)` with `has_aux`. The model
        is, or holds, one or several that `sparse_vjp` made.
      has_aux: Whether `loss_fn` returns something besides the loss.
      microbatches: As for `msbp.value_and_grad`. Graph nodes among the arguments, such as an `nnx.Rngs`, go from one
        part to the next as the model does.
      wrt: An NNX filter: which Variables to differentiate. Of the others no gradient is computed.

    Returns:
      A function of the same arguments that returns `(loss, grads)`, or `((loss, aux), grads)`, like
      `nnx.value_and_grad`: `nnx.Optimizer.update(model, grads)` takes `grads`. The model's `msbp.Memory` takes on its
      new value, and whatever else the loss writes to the model or its arguments arrives there. Call it inside
      `nnx.jit`.

    Raises:
      TypeError: The loss is not a real scalar.
      ValueError: No Variable is differentiated, or no wrapped model in the first argument has a memory.

    Example:
      >>> import jax.numpy as jnp, optax, msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=4), decay=0.8))
      >>> x = jnp.ones((2, 8))
      >>> memory = model.init_memory(x)
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> loss, grads = msbp.nnx.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
      >>> _ = optimizer.update(model, grads)
    """
    count = check_microbatches(microbatches)

    @functools.wraps(loss_fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        check_result(result, has_aux)
        check_loss(result[0] if has_aux else result)
        return result

    differentiated = nnx.DiffState(0, _and_carriers(wrt))
    plain = nnx.value_and_grad(checked, argnums=differentiated, has_aux=has_aux)

    def whole(model: Any, *args: Any, **kwargs: Any) -> Any:
        passages = _opened(model, wrt)
        try:
            result, grads = plain(model, *args, **kwargs)
        except BaseException:
            _closed(passages, None)
            raise
        returned, grads = _apart(grads)
        grads, by_module = all_at_once((grads, dict(_by_module(model, returned))))
        _closed(passages, by_module)
        return result, grads

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model, *rest = args or (kwargs.pop(_first_parameter(loss_fn, kwargs)),)
        return whole(model, *rest, **kwargs) if count is None else in_parts(model, *rest, **kwargs)

    def in_parts(model: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs)
        objects = (model, arguments.nodes)
        graphdef, state = nnx.split(objects)

        def step(params: Any, memory: Any, state: Any, others: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
            del params, memory, kwargs
            copy, nodes = nnx.merge(graphdef, state, copy=True)
            part_args, part_kwargs = arguments.put_together(nodes, others)
            result, grads = whole(copy, *part_args, **part_kwargs)
            value, aux = result if has_aux else (result, None)
            return Step(value, aux, grads, None, nnx.state((copy, nodes)))

        params = jax.tree.map(lambda node: nnx.state(node, wrt), model, is_leaf=_is_module)
        done = in_microbatches(step, count, params, None, state, tuple(arguments.others), {})
        nnx.update(objects, done.carried)
        return ((done.value, done.aux) if has_aux else done.value), done.grads

    return wrapped


def diagnose(loss_fn: Callable[..., Any], *, has_aux: bool = False, wrt: Any = nnx.Param) -> Callable[..., Any]:
    """Turn a loss of a model into a function that compares its sparse gradients with the true ones.

    Args:
      loss_fn: As for `value_and_grad`.
      has_aux: As for `value_and_grad`.
      wrt: As for `value_and_grad`.

    Returns:
      A function `(model, *args, **kwargs) -> msbp.Diagnosis`, which changes nothing; see `msbp.diagnose`.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=16), decay=0.8))
      >>> x = jnp.ones((2, 8))
      >>> memory = model.init_memory(x)
      >>> diagnosis = msbp.nnx.diagnose(lambda model, x: (model(x) ** 2).mean())(model, x)
      >>> round(float(diagnosis.sites["kernel"].density), 2)
      0.25
    """

    def wrapped(model: Any, *args: Any, **kwargs: Any) -> training.Diagnosis:
        arguments = Arguments(args, kwargs)
        trained = lambda path, value: path[0] == 0 and nnx.filterlib.to_predicate(_without_memory(wrt))(path, value)
        parts: tuple[Any, ...] = nnx.split((model, arguments.nodes), trained, Memory, ...)
        graphdef, params, memory, rest = parts

        def pure(params: Any, memory: Any) -> Any:
            copy, copies = nnx.merge(graphdef, params, memory, rest, copy=True)
            args, kwargs = arguments.put_together(copies, arguments.others)
            return loss_fn(copy, *args, **kwargs)

        return training.diagnose(pure, has_aux=has_aux)(params, memory)

    return wrapped


def metrics(model: Any) -> dict[str, jax.Array]:
    """Return what the memory of a model tells of itself: a flat dict of scalars; see `msbp.metrics`.

    Args:
      model: A wrapped model, or an NNX model that holds one or several. It is read, and nothing else.

    Returns:
      Scalars by the wrapped model's place, its site and the scalar's name: "kernel/memory_norm", or
      "encoder/kernel/memory_norm" for a wrapped `model.encoder`. Inside `nnx.jit` they are arrays like any other.

    Raises:
      TypeError: `model` is not an NNX model; as `msbp.metrics`.
      ValueError: No wrapped model in it has a memory.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=4), decay=0.8))
      >>> memory = model.init_memory(jnp.ones((2, 8)))
      >>> {name: float(value) for name, value in msbp.nnx.metrics(model).items()}
      {'kernel/memory_norm': 0.0}
    """
    if not _holds_a_module(model):
        raise TypeError(
            f"msbp.nnx.metrics takes an NNX model that holds its memory, got {type(model).__name__}. For a memory or a "
            "state of nnx.state or nnx.split, there is msbp.metrics(memory)."
        )
    if all(node.memory is None for _, node in nnx.iter_graph(model) if isinstance(node, SparseNNXModule)):
        raise ValueError(
            f"{type(model).__name__} holds no model with a memory. Wrap it with msbp.sparse_vjp and call "
            "model.init_memory(*arguments) first."
        )
    return training.metrics(nnx.state(model, nnx.All(Memory, nnx.Not(Carrier))))


def _opened(model: Any, wrt: Any) -> list[tuple[SparseNNXModule, dict[str, Passage]]]:
    """Give every wrapped model its carriers."""
    if not _holds_a_module(model):
        raise TypeError(
            f"The first argument of loss_fn must be an NNX model, or hold one, got {type(model).__name__}. For "
            "Linen modules and functions there is msbp.value_and_grad(loss_fn)(params, memory, ...)."
        )
    if not jax.tree.leaves(nnx.state(model, _without_memory(wrt))):
        raise ValueError(
            f"No Variable of the first argument is of the kind wrt={wrt!r}, so there is no gradient to return."
        )
    wrapped = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, SparseNNXModule)]
    passages = []
    for path, module in wrapped:
        if module.memory is None:
            continue
        # Keys depend on the place, so that equal models draw different random numbers.
        place = "/".join(map(str, path))
        by_site = {name: Passage(v.get_value(), name=f"{place}/{name}") for name, v in module.memory.items()}
        for name, passage in by_site.items():
            module.memory[name].set_value(passage.keys_now)
        if by_site:
            module.carriers = nnx.data({name: Carrier(passage.carriers) for name, passage in by_site.items()})
        passages.append((module, by_site))
    if not passages and (not wrapped or any(module._plan.has_state for _, module in wrapped)):
        raise ValueError(
            "The first argument of loss_fn holds no model with a memory, so that the backward would be dense. Wrap the "
            "model with msbp.sparse_vjp and call model.init_memory(*arguments) first; or use nnx.value_and_grad."
        )
    return passages


def _closed(passages: list[tuple[SparseNNXModule, dict[str, Passage]]], returned: dict[int, Any] | None) -> None:
    """Take the carriers away, and let every memory take on its new value, or the old one if nothing was returned."""
    for module, by_site in passages:
        module.carriers = nnx.data(None)
        assert module.memory is not None
        for name, passage in by_site.items():
            new = passage.memory if returned is None else passage.collected(returned[id(module)][name])
            module.memory[name].set_value(new)


def _by_module(model: Any, returned: Any) -> Any:
    """Yield the identity of each wrapped model with what its sites gave the carriers, by site."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, SparseNNXModule) and node.carriers is not None:
            found = returned
            for part in (*path, "carriers"):
                found = found[part]
            yield id(node), {name: Passage.of_sites(found[name].get_value()) for name in node.carriers}


def _apart(grads: Any) -> tuple[Any, Any]:
    """Return what sites gave the carriers, and the gradients: of a model, or of a container of several."""
    is_state = lambda node: isinstance(node, nnx.State)
    pairs = [nnx.filter_state(state, Carrier, ...) for state in jax.tree.leaves(grads, is_leaf=is_state)]
    structure = jax.tree.structure(grads, is_leaf=is_state)
    returned, gradients = (jax.tree.unflatten(structure, states) for states in zip(*pairs, strict=True))
    return returned, gradients


def _is_module(node: Any) -> bool:
    return isinstance(node, nnx.Pytree)


def _holds_a_module(tree: Any) -> bool:
    return any(map(_is_module, jax.tree.leaves(tree, is_leaf=_is_module)))


def _first_parameter(loss_fn: Callable[..., Any], kwargs: dict[str, Any]) -> str:
    """Return the name of a loss's first argument, which is passed by it."""
    name = next(iter(inspect.signature(loss_fn).parameters), None)
    if name is None or name not in kwargs:
        raise TypeError(f"The first argument of loss_fn, the model, is missing; got {', '.join(kwargs) or 'nothing'}.")
    return name


def _without_memory(wrt: Any) -> Any:
    return nnx.All(wrt, nnx.Not(Memory))


def _and_carriers(wrt: Any) -> Any:
    return nnx.Any(_without_memory(wrt), Carrier)
