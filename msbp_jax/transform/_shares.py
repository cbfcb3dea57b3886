"""Which share of the rows, or entries, each site keeps where only the run tells: given, read from a memory, or all."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import jax

from msbp_jax import _checks, _compat
from msbp_jax.carriers import plain
from msbp_jax.formats import Format
from msbp_jax.sparsifiers._metrics import metrics_of
from msbp_jax.transform._plan import OUTPUTS
from msbp_jax.transform._program import Program
from msbp_jax.transform._remembers import Remembers, abstract_result
from msbp_jax.transform._report_words import WHILE_NOTHING


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The shares that are kept.

    Attributes:
      by_site: Of each site whose shapes do not tell; 1 where nothing is left out.
      entering: Of the rows, where the gradient enters the model; None if it is not known.
      said: Where they come from, in words that follow "Expected"; "" if shapes tell all.
      mixed: Sites that skip rows, but have none that are 0, as a norm over the batch mixes them.
      kept_by_rows: Whether some site skips rows that come in as 0, and no draw says how many.
      unused: Why a share that was given is of no use, "" if it is of some, or none was given.
    """

    by_site: dict[str, float]
    entering: float | None
    said: str
    mixed: tuple[str, ...]
    kept_by_rows: bool
    unused: str


def find_shares(
    program: Program, share: float | None, memory: Mapping[str, Any] | None, above: Container[str]
) -> Shares:
    """Return the shares of the sites of a program.

    Args:
      program: The program.
      share: One for all; None to read them from the memory.
      memory: Of the program; None for none.
      above: Sites whose gradient has no zero rows.
    """
    sparse = {site.name: abstract_result(site) for site in program.sparse_sites}
    dynamic = {name: p for name, p in sparse.items() if not all(_is_known(q) for q in p.parts)}
    told = densities(memory)
    own = {name: _tells_density(site) for name, site in ((s.name, s) for s in program.sparse_sites) if name in dynamic}
    skips = {name for name, p in dynamic.items() if any(q.skips == "rows" and not _is_known(q) for q in p.parts)}
    mixed = tuple(name for name in dynamic if name in above and name in skips and not own[name])
    known = _known_entering(program)
    drawn = None if known is None else told.get(OUTPUTS, known)  # a share that is given cannot change it
    entering = drawn if drawn is not None else share if share is not None else told.get(OUTPUTS)
    by_site = {}
    for name in dynamic:
        found = entering if not own[name] else share if share is not None else told.get(name)
        by_site[name] = 1.0 if name in mixed or found is None else found
    needed = any(own[name] or known is None for name in dynamic if name not in mixed)
    return Shares(
        by_site=by_site,
        entering=entering,
        said="" if len(mixed) == len(by_site) else _said(by_site, share if needed else None, told, known),
        mixed=mixed,
        kept_by_rows=bool(skips) and known is None,
        unused="" if share is None or needed or mixed else _unused(share, known if dynamic else None),
    )


def densities(memory: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the mean densities that the states of a memory tell, by site; none before the first step."""
    found = {}
    for site, state in plain(dict(memory or {})).items():
        if not all(is_concrete(leaf) for leaf in jax.tree.leaves(state)):
            continue
        told = [float(value) for name, value in metrics_of(state).items() if name.split("/")[-1] == "density"]
        if told and min(told) > 0:  # each is a running mean, 0 at the start
            found[str(site)] = min(1.0, sum(told) / len(told))
    return found


def is_concrete(leaf: Any) -> bool:
    """Whether a leaf is an array with numbers in it, and no shape or tracer."""
    return _checks.is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct | _compat.Tracer)


def _is_known(p: Format) -> bool:
    return p.kept_share() is not None


def _tells_density(site: Remembers) -> bool:
    """Whether a site's own state counts what it keeps; else it skips what comes in as 0."""
    assert site.sparsifier is not None
    told = jax.eval_shape(lambda state: metrics_of(state), site.abstract_state)
    return any(name.split("/")[-1] == "density" for name in told)


def _known_entering(program: Program) -> float | None:
    """Return the share of the rows that are drawn at the outputs, where that was asked for."""
    outputs = program.outputs
    if outputs is None or outputs.sparsifier is None or outputs.is_empty:
        return None
    return abstract_result(outputs).kept_share()


def _unused(share: float, known: float | None) -> str:
    instead = "shapes tell what is kept" if known is None else f'"{OUTPUTS}" draws {known:.2g} of the rows, exactly'
    return f"share={share:.2g} is of no use here: {instead}."


def _said(by_site: dict[str, float], share: float | None, told: dict[str, float], known: float | None) -> str:
    if share is not None:
        return f"with a share of {share:.2g} kept"
    read = sorted({told[name] for name in (*by_site, OUTPUTS) if name in told})
    if read:
        several = f"{read[0]:.2g} to {read[-1]:.2g}" if f"{read[0]:.2g}" != f"{read[-1]:.2g}" else f"{read[0]:.2g}"
        return f"at the density of the memory, {several}"
    if known is not None:
        return f'with {known:.2g} of the rows kept, as "{OUTPUTS}" says'
    return WHILE_NOTHING
