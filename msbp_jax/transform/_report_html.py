"""A report as HTML, for notebooks: the sentences as paragraphs, the layers as tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msbp_jax.transform._report_words import headline, measured_words, ms, ratio, saved_words, skipped_words

if TYPE_CHECKING:
    from msbp_jax.transform._report import Report


def to_html(report: Report) -> str:
    """Return a report as HTML; every word of it is escaped."""
    parts = [f"<p><b>{_escaped(headline(report))}</b></p>"]
    parts += [f"<p>{_escaped(text)}</p>" for text in measured_words(report.measured)]
    if report.weights:
        rows = [
            ("x".join(map(str, r.shape)), str(r.entries), f"{r.density:.1%}", str(r.products), r.backend, r.warning)
            for r in report.weights
        ]
        heads = ("weight", "shape", "entries", "density", "products", "backend", "")
        named = [(row.name, *cells) for row, cells in zip(report.weights, rows, strict=True)]
        parts.append(_table("Sparse weights, forward and backward", heads, named))
    if report.sparse or not report.weights:
        parts.append(_table(saved_words(report), _SPARSE, _sparse(report)))
    if report.dense:
        dense = [(row.name, _times(report, row.name)[2], row.contraction, row.reason) for row in report.dense]
        parts.append(_table("Dense backward", ("layer", "ms", "contraction", "reason"), dense))
    said = [report.entering, *skipped_words(report), *report.notes]
    parts += [f"<p>{_escaped(text)}</p>" for text in said if text]
    return "\n".join(parts)


_SPARSE = (
    *("layer", "backward", "ms", "dense ms", "saved", "backend"),
    *("contraction", "sparsifier", "keeps", "rows/group", "layers", ""),
)


def _sparse(report: Report) -> Iterable[Sequence[str]]:
    for row in report.sparse:
        group = "None" if row.one_group else "-" if row.rows_per_group is None else str(row.rows_per_group)
        saved = f"by {row.skips}" if row.skips else f"{row.saved:.1%}"
        what = (row.contraction, row.sparsifier, row.keeps, group, str(row.instances), row.warning)
        yield (row.name, *_times(report, row.name), saved, row.backend, *what)


def _times(report: Report, name: str) -> tuple[str, str, str]:
    layer = report.layers.get(name)
    return ("-", "-", "-") if layer is None else (ratio(layer.speed_up), ms(layer.sparse), ms(layer.dense))


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = "\n".join(line(cells, "td") for cells in rows)
    return f"<table>\n<caption>{_escaped(caption)}</caption>\n{line(heads, 'th')}\n{body}\n</table>"


def _escaped(text: str) -> str:
    return html.escape(text)
