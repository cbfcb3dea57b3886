"""`diagnose`: how near the sparse gradients are to the true ones. For looking, not for the training path."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from msbp_jax import _compat
from msbp_jax.carriers import Observer, branches_of
from msbp_jax.formats import accumulation_dtype
from msbp_jax.sparsifiers._metrics import unique_name
from msbp_jax.training._value_and_grad import differentiate


class SiteDiagnosis(NamedTuple):
    """What the backward did at one site.

    Attributes:
      cosine: Cosine between the sparse and the true gradient of the site's weight, over all its instances.
      density: Share of the entries of the gradient of the layer's output that were propagated.
      memory_norm: Euclidean norm of the site's new memory; of a state without one, over all its floating leaves.
    """

    cosine: jax.Array
    density: jax.Array
    memory_norm: jax.Array


class Diagnosis(NamedTuple):
    """What the backward did in one step; `print` it.

    Attributes:
      cosine: Cosine between the sparse and the true gradient of all parameters.
      sites: By site name, `#i` behind the names that several wrapped models share.
    """

    cosine: jax.Array
    sites: dict[str, SiteDiagnosis]

    def __str__(self) -> str:
        """Return a table, one row a site, the cosine of all parameters below."""
        text = io.StringIO()
        Console(file=text, width=160, force_terminal=False).print(_table(self))
        return text.getvalue().rstrip()

    def to_dict(self) -> dict[str, jax.Array]:
        """Return every number by its name, flat: "cosine", then "Dense_0/kernel/cosine" and so on for each site.

        The names of memory norms are those of `msbp.metrics`, where no two sites share a name.
        """
        of_sites = {
            f"{name}/{what}": value for name, site in self.sites.items() for what, value in site._asdict().items()
        }
        return {"cosine": self.cosine} | of_sites


def diagnose(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Diagnosis]:
    r"""Turn a loss into a function that compares its sparse gradients with the true ones.

        cosine = <a, b> / (||a|| ||b||),   a sparse, b true, both at the same parameters, memory and batch.

    Args:
      loss_fn: As for `value_and_grad`.
      has_aux: As for `value_and_grad`.

    Returns:
      A function `(params, memory, *args, **kwargs) -> Diagnosis`. It runs two backward passes and changes nothing.
      Sites whose sparsifier has no state are measured like the others.

    Raises:
      TypeError: As `value_and_grad`.
      ValueError: As `value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=16), decay=0.8))
      >>> w, x = jnp.ones((4, 64)), jax.random.normal(jax.random.key(0), (2, 4))
      >>> loss_fn = lambda w, memory, x: (f(w, x, memory=memory) ** 2).mean()
      >>> diagnosis = msbp.diagnose(loss_fn)(w, f.init_memory(w, x), x)
      >>> round(float(diagnosis.sites["params"].density), 2)
      0.25
      >>> sorted(diagnosis.to_dict())
      ['cosine', 'params/cosine', 'params/density', 'params/memory_norm']
    """

    def wrapped(params: Any, memory: Any, *args: Any, **kwargs: Any) -> Diagnosis:
        sparse, dense = Observer("sparse"), Observer("dense")
        _, grads, _, logs = differentiate(loss_fn, has_aux, sparse, params, memory, args, kwargs)
        _, true_grads, _, true_logs = differentiate(loss_fn, has_aux, dense, params, memory, args, kwargs)
        sites: dict[str, SiteDiagnosis] = {}
        for key, name in sparse.sites.items():
            if key in logs and key in true_logs:
                sites[unique_name(name, sites)] = _site(logs[key], true_logs[key])
        return Diagnosis(_cosine(grads, true_grads), sites)

    return wrapped


def _site(log: Any, true_log: Any) -> SiteDiagnosis:
    pieces, truth = branches_of(log), branches_of(true_log)
    extra, true_extra = [[_ran(site, ran) for site, ran in some] for some in (pieces, truth)]
    runs = jnp.stack([jnp.mean(ran.astype(jnp.float32)) for _, ran in pieces]).sum()
    density = jnp.stack([jnp.mean(piece["density"]) for piece in extra]).sum() / jnp.maximum(
        runs, jnp.finfo(runs.dtype).tiny
    )
    norm = optax.tree.norm([piece["norm"] for piece in extra])
    return SiteDiagnosis(
        _cosine([piece["dw"] for piece in extra], [piece["dw"] for piece in true_extra]), density, jnp.asarray(norm)
    )


def _ran(seen: dict[str, jax.Array], ran: jax.Array) -> dict[str, jax.Array]:
    """Return what was observed, with zeros where the branch did not run."""

    def masked(value: jax.Array) -> jax.Array:
        return jnp.where(ran.reshape(ran.shape + (1,) * (value.ndim - ran.ndim)), value, jnp.zeros((), value.dtype))

    return {name: masked(value) for name, value in seen.items()}


def _cosine(a: Any, b: Any) -> jax.Array:
    numbers = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]
    a, b = ([leaf.astype(accumulation_dtype(leaf.dtype)) for leaf in numbers(tree)] for tree in (a, b))
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return optax.tree.vdot(a, b) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def _table(diagnosis: Diagnosis) -> Table:
    table = Table(title="Sparse against true gradients", title_justify="left")
    table.add_column("site", overflow="fold")
    for field in SiteDiagnosis._fields:
        table.add_column(field.replace("_", " "), justify="right")
    for name, site in diagnosis.sites.items():
        table.add_row(name, *map(_number, site))
    table.add_section()
    table.add_row("all parameters", _number(diagnosis.cosine))
    return table


def _number(value: jax.Array) -> str:
    """Return four digits of a number, or what is known of it: inside a jit there is no number yet."""
    if isinstance(value, _compat.Tracer) or value.ndim:
        return jax.typeof(value).str_short()
    return f"{float(value):.4g}"
