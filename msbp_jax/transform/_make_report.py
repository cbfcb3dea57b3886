"""The report of a program, put together: what is sparse, what a step is expected to gain, and what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from msbp_jax.kernels.choice.advice import note
from msbp_jax.memory import MemorizedState
from msbp_jax.rules import SparseProduct
from msbp_jax.transform._asked import Asked
from msbp_jax.transform._estimate import StepEstimate, estimate_step, with_update
from msbp_jax.transform._measure import measure as measure_steps
from msbp_jax.transform._mixes import find_mixing
from msbp_jax.transform._program import Program
from msbp_jax.transform._remembers import abstract_result
from msbp_jax.transform._report import Report, SparseRow
from msbp_jax.transform._report_rows import dense_row, entering, sparse_row
from msbp_jax.transform._shares import Shares, find_shares
from msbp_jax.transform._sites import Site
from msbp_jax.transform._sparse_uses import WeightRow, describe, find_uses


def make_report(program: Program, params: Any, asked: Asked, memory: Mapping[str, Any] | None) -> Report:
    """Return the report of a program.

    Args:
      program: The program.
      params: The pytree that its first arguments are the leaves of.
      asked: What is asked for.
      memory: To read densities from; None for none.

    Raises:
      TypeError: The optimizer's update needs more than gradients, state, parameters and a loss, and is to be measured.
      ValueError: A pattern of the plan matches nothing, or can never apply; steps are to be measured, and arguments are
        shapes; the optimizer does not take the parameters.
    """
    program.check_plan()
    sites, weights = _with_weights(program)
    mixing = find_mixing(program)
    shares = find_shares(program, asked.share, memory, mixing.mixed)
    sparse = tuple(sparse_row(site, program.backend) for site in sites if site.sparsifier is not None)
    expected, unexpected = _expected(program, shares, measured=asked.measure)
    if expected is not None and asked.optimizer is not None:
        expected = with_update(expected, asked.optimizer, params)
    measured = None
    if asked.measure:
        costs = {} if expected is None else {layer.name: layer.sparse for layer in expected.layers}
        dearest = sorted((row.name for row in sparse), key=lambda name: -costs.get(name, 0.0))
        entered = shares.entering if shares.kept_by_rows else None
        measured = measure_steps(program, params, optimizer=asked.optimizer, share=entered, dearest=dearest)
        measured = dataclasses.replace(measured, at=shares.said if shares.kept_by_rows else "")
    notes = (shares.unused, _mixed(shares, sparse, expected), _idle(program, mixing.centred), note())
    return Report(
        entering=entering(program.outputs, sparse),
        sparse=sparse,
        dense=tuple(map(dense_row, _dense(sites))),
        saved=_saved(sites, sparse, weights),
        weights=tuple(weights),
        expected=expected,
        unexpected=unexpected,
        density=shares.said,
        shares=tuple(shares.by_site.items()),
        measured=measured,
        notes=tuple(text for text in notes if text),
    )


def _with_weights(program: Program) -> tuple[list[Site], list[WeightRow]]:
    """Return the sites with their sparse products, and what becomes of sparse weights."""
    uses = find_uses(program.jaxpr, program.weights) if program.weights else []
    products = {use.place: use.operation for use in uses if use.operation is not None}
    sites = [dataclasses.replace(s, operation=products.get(s.found.place, s.operation)) for s in program.sites]
    rows = [
        describe(program.parameters[number][0], weight, [use for use in uses if use.leaf == number])
        for number, weight in program.weights.items()
    ]
    return sites, rows


def _dense(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.sparsifier is None and not isinstance(site.operation, SparseProduct)]


def _saved(sites: list[Site], sparse: tuple[SparseRow, ...], weights: list[WeightRow]) -> float:
    density = {row.name: row.density for row in weights}  # a sparse weight has so much less work, whatever is kept
    work = {
        site.name: site.repeats
        * site.dims.rows
        * site.dims.m
        * site.dims.n
        * (density.get(site.name.split("#")[0], 1) if isinstance(site.operation, SparseProduct) else 1)
        for site in sites
    }
    return sum(row.saved * work[row.name] for row in sparse) / max(1, sum(work.values()))


def _expected(program: Program, shares: Shares, *, measured: bool) -> tuple[StepEstimate | None, str]:
    """Return what a step is expected to take, each layer at its own share, or why that is not known."""
    if program.weights:
        instead = "" if measured else "; measure=True times it"
        return None, f"there is no model of it with sparse weights{instead}"
    try:
        return estimate_step(program, share=shares.by_site), ""
    except (NotImplementedError, TypeError, ValueError) as error:  # a report is not to fail where a derivative would
        return None, f"its gradient cannot be traced ({str(error).splitlines()[0].rstrip('.')})"


def _mixed(shares: Shares, sparse: tuple[SparseRow, ...], expected: StepEstimate | None) -> str:
    """Say where nothing is skipped, as a norm over the batch mixes the rows; some may gain all the same."""
    if not shares.mixed:
        return ""
    text = (
        f"{', '.join(shares.mixed)}: below a norm over the batch, which mixes the rows, so that none of the gradient "
        "is 0 and nothing is skipped"
    )
    by_images = {row.name for row in sparse if row.backend.startswith("native, images")} & set(shares.mixed)
    layers = () if expected is None else expected.layers
    faster = [layer.name for layer in layers if layer.name in by_images and round(layer.speed_up, 2) > 1]
    if faster:
        others = "" if len(faster) == len(shares.mixed) else "; leave the others dense (msbp.dense())"
        return (
            f"{text}. What {', '.join(faster)} {'gains' if len(faster) == 1 else 'gain'} is the gain of native kernels "
            f"with all images, which msbp.dense(native=True) has without a search for rows{others}."
        )
    if {row.name for row in sparse} == set(shares.mixed):
        return f"{text}. That is all that is sparse: it saves nothing here, and a memory for it is idle."
    return f"{text}; leave them dense (msbp.dense())."


def _idle(program: Program, centred: Container[str]) -> str:
    """Say which memories stay 0, as the gradient of each feature sums to 0 over the rows that share a choice."""
    idle = [site.name for site in program.sparse_sites if site.name in centred and _remembers_a_mean(site)]
    if not idle:
        return ""
    return (
        f"{', '.join(idle)}: right below a norm over the batch, which makes the gradient of each feature sum to 0 over "
        'the batch. The memory of what is left out, its mean, stays 0: it is idle. reduce="slot" or no memory serves.'
    )


def _remembers_a_mean(site: Site) -> bool:
    """Whether a site has a memory for each feature, and one choice for all rows."""
    state = site.abstract_state
    mean = isinstance(state, MemorizedState) and len(state.residual.shape) == 1 + len(site.instances)
    return mean and abstract_result(site).columns_are_shared
