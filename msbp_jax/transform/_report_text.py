"""A report as text, 80 columns wide whatever the terminal: the headline, then two or more lines for each layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from msbp_jax.transform._report_words import headline, measured_words, ms, saved_words, skipped_words

if TYPE_CHECKING:
    from msbp_jax.transform._report import Report

WIDTH = 80
_NAMES = 34  # a longer name has a line of its own


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
    warnings = [(row.name, row.warning) for row in (*report.weights, *report.sparse)]
    said = [report.entering, *(f"{name}: {warning}" for name, warning in warnings if warning)]
    said += [*skipped_words(report), *report.notes]
    blocks.append("\n".join(_filled(text) for text in said if text))
    return "\n\n".join(block for block in blocks if block)


def _sparse(report: Report) -> Iterator[str]:
    yield from _filled(saved_words(report)).splitlines()
    if not report.sparse:
        return
    yield _row("layer", ("backward", "ms", "dense", "saved"), "backend")
    for row in report.sparse:
        layer = report.layers.get(row.name)
        times = ("-", "-", "-") if layer is None else (f"{layer.speed_up:.3g}x", ms(layer.sparse), ms(layer.dense))
        yield _row(row.name, (*times, f"by {row.skips}" if row.skips else f"{row.saved:.1%}"), row.backend)
        group = "None" if row.one_group else row.rows_per_group
        groups = "" if group is None else f", rows/group {group}"
        memories = "" if row.instances == 1 else f", {row.instances} memories"
        yield from _below(f"{row.contraction}; {row.sparsifier}; keeps {row.keeps}{groups}{memories}")


def _weights(report: Report) -> Iterator[str]:
    yield "Sparse weights, forward and backward"
    yield _row("weight", ("density", "entries", "products"), "backend")
    for row in report.weights:
        yield _row(row.name, (f"{row.density:.1%}", str(row.entries), str(row.products)), row.backend)
        yield from _below("x".join(map(str, row.shape)))


def _dense(report: Report) -> Iterator[str]:
    yield "Dense backward"
    yield _row("layer", ("ms",), "contraction")
    for row in report.dense:
        layer = report.layers.get(row.name)
        yield _row(row.name, ("-" if layer is None else ms(layer.dense),), row.contraction)
        yield from _below(row.reason)


def _row(name: str, numbers: Sequence[str], last: str) -> str:
    """Return the first line of a row; what does not fit goes on below, and nothing is cut off."""
    cells = "".join(f"{number:>9}" for number in numbers)
    first = f"{name:<{_NAMES}}" if len(name) <= _NAMES else f"{name}\n{'':<{_NAMES}}"
    if len(last) <= WIDTH - _NAMES - len(cells) - 2:
        return f"{first}{cells}  {last}"
    return "\n".join((f"{first}{cells}", *_below(last)))


def _below(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", **_WHOLE)


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, **_WHOLE)


# Names and shapes are not cut, even if one is longer than a line.
_WHOLE = {"break_long_words": False, "break_on_hyphens": False}
