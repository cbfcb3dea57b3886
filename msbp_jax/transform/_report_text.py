"""A report as text, 80 columns wide whatever the terminal: the headline, then two or more lines for each layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from msbp_jax.transform._report_words import headline, measured_words, ms, ratio, saved_words, skipped_words

if TYPE_CHECKING:
    from msbp_jax.transform._report import Report, SparseRow

WIDTH = 80
_NAMES = 40  # a longer name has a line of its own
_CELL = 9  # and a space before it


def to_text(report: Report) -> str:
    """Return the lines of a report."""
    blocks = [_filled(headline(report)), *map(_filled, measured_words(report.measured))]
    blocks = ["\n".join(block for block in blocks if block)]
    if report.weights:
        blocks.append("\n".join(_weights(report)))
    if report.sparse or not report.weights:
        blocks.append("\n".join(_sparse(report)))
    if report.dense:
        blocks.append("\n".join(_dense(report)))
    warnings = [(row.name, row.warning) for row in report.weights]
    warnings += [(row.name, row.warning) for row in report.sparse]
    said = [report.entering, *(f"{name}: {warning}" for name, warning in warnings if warning)]
    said += [*skipped_words(report), *report.notes]
    blocks.append("\n".join(_filled(text) for text in said if text))
    return "\n\n".join(block for block in blocks if block)


def _sparse(report: Report) -> Iterator[str]:
    yield _filled(saved_words(report))
    if not report.sparse:
        return
    yield _row("layer", ("backward", "ms", "dense ms", "saved"))
    for row in report.sparse:
        layer = report.layers.get(row.name)
        times = ("-", "-", "-") if layer is None else (ratio(layer.speed_up), ms(layer.sparse), ms(layer.dense))
        yield _row(row.name, (*times, _saved(row)))
        group = "None" if row.one_group else row.rows_per_group
        groups = "" if group is None else f", rows/group {group}"
        memories = "" if row.instances == 1 else f", {row.instances} layers"
        yield _below(f"{row.backend}; {row.contraction}; {row.sparsifier}; keeps {row.keeps}{groups}{memories}")


def _saved(row: SparseRow) -> str:
    """Return what a layer saves; a word where only the run tells, and a short one where that is too long."""
    by = f"by {row.skips}"
    return f"{row.saved:.1%}" if not row.skips else by if len(by) <= _CELL else "at run"


def _weights(report: Report) -> Iterator[str]:
    yield "Sparse weights, forward and backward"
    yield _row("weight", ("density", "entries", "products"))
    for row in report.weights:
        yield _row(row.name, (f"{row.density:.1%}", str(row.entries), str(row.products)))
        yield _below(f"{row.backend}; {'x'.join(map(str, row.shape))}")


def _dense(report: Report) -> Iterator[str]:
    yield "Dense backward"
    yield _row("layer", ("ms",))
    for row in report.dense:
        layer = report.layers.get(row.name)
        yield _row(row.name, ("-" if layer is None else ms(layer.dense),))
        yield _below(f"{row.contraction}; {row.reason}")


def _row(name: str, numbers: Sequence[str]) -> str:
    """Return the first line of a row; a name that does not fit has it for itself."""
    first = f"{name:<{_NAMES}}" if len(name) <= _NAMES else f"{name}\n{'':<{_NAMES}}"
    return first + "".join(f" {number:>{_CELL}}" for number in numbers)


def _below(text: str) -> str:
    return _wrapper("    ").fill(text)


def _filled(text: str) -> str:
    return _wrapper("").fill(text)


def _wrapper(indent: str) -> textwrap.TextWrapper:
    """Return what breaks lines between words: names and shapes are not cut, even if one is longer than a line."""
    return textwrap.TextWrapper(
        WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
