"""What `sparse_vjp` does with a program, one row a contraction, and what it leaves dense, with the reason."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from msbp_jax import kernels
from msbp_jax.formats import Columns, Dense, Entries, Format, Rows
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.choice.advice import note, warning
from msbp_jax.kernels.choice.layer import Layer, layer_of
from msbp_jax.kernels.choice.order import fastest_first
from msbp_jax.rules import Path, SparseProduct, path_of
from msbp_jax.sparsifiers._where import abstract_norms
from msbp_jax.transform._outputs import Outputs
from msbp_jax.transform._sites import Site
from msbp_jax.transform._sparse_uses import WeightRow


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseRow:
    """A contraction with a sparse backward.

    Attributes:
      name: Path of its parameter.
      contraction: Shapes, `lhs x rhs`.
      rows: Rows of the gradient.
      m: Contracted features.
      n: Output features.
      sparsifier: Name of its sparsifier.
      keeps: What of the gradient is kept, as far as shapes tell.
      k: Features kept; None for a format that does not keep as many for all.
      rows_per_group: Rows that share a choice; None for a format without groups.
      one_group: Whether all rows share one, `rows_per_group=None`.
      backend: Backend that will run.
      saved: Share of the backward's multiply-adds that is saved.
      skips: What is left out besides, as only the run tells: "rows", "entries", or "" for nothing.
      instances: How many memories it has (stacked layers).
      warning: Why it will probably be slower than dense ("" if not).
    """

    name: str
    contraction: str
    rows: int
    m: int
    n: int
    sparsifier: str
    keeps: str
    k: int | None
    rows_per_group: int | None
    one_group: bool
    backend: str
    saved: float
    skips: str
    instances: int
    warning: str


_WHOLE_EXAMPLES = (
    "its products run whole: native kernels leave out images of plain convolutions alone on a CPU (no groups, not "
    "transposed, float32 or bfloat16), as XLA's convolutions in branches take tens of times as long there."
)

_BY = (
    "{}: what is saved is the share of the {} that are left out; while none is, looking for them costs a few percent "
    "of a step, most where layers are small."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DenseRow:
    """A contraction that stays dense.

    Attributes:
      name: Path of its parameter, or `@dot_general_i` where it has none.
      contraction: Shapes, `lhs x rhs`.
      reason: Why.
    """

    name: str
    contraction: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is sparse and what is not; `print` it.

    Attributes:
      entering: What is chosen of the gradient where it enters the model ("" if nothing is).
      sparse: The sparse contractions.
      dense: The others.
      saved: Share of the multiply-adds of the whole backward, over all contractions, that is saved, as
        far as shapes tell: what depends on the rows that are left out counts as nothing.
      weights: What becomes of weights that are sparse.
    """

    entering: str
    sparse: tuple[SparseRow, ...]
    dense: tuple[DenseRow, ...]
    saved: float
    weights: tuple[WeightRow, ...] = ()

    def __str__(self) -> str:
        """Return two tables."""
        text = io.StringIO()
        console = Console(file=text, width=160, force_terminal=False)
        if self.weights:
            console.print(_weights_table(self.weights))
        if self.sparse or not self.weights:
            console.print(_sparse_table(self))
        if self.entering:
            console.print(self.entering, highlight=False)
        if self.dense:
            console.print(_dense_table(self.dense))
        warnings = [(row.name, row.warning) for row in self.weights] + [(row.name, row.warning) for row in self.sparse]
        for name, said in warnings:
            if said:
                console.print(f"{name}: {said}", highlight=False)
        for skipped in _skipped(self):
            console.print(_BY.format(skipped.capitalize(), skipped), highlight=False)
        if said := note():
            console.print(said, highlight=False)
        return text.getvalue().rstrip()


def make_report(
    sites: list[Site], outputs: Outputs | None, backend: str | None, weights: Sequence[WeightRow] = ()
) -> Report:
    """Return the report of a program's sites, of the gradient that enters it, and of its sparse weights."""
    sparse = tuple(_sparse_row(site, backend) for site in sites if site.sparsifier is not None)
    dense = tuple(
        DenseRow(name=site.name, contraction=_shapes(site), reason=site.reason)
        for site in sites
        if site.sparsifier is None and not isinstance(site.operation, SparseProduct)
    )
    density = {row.name: row.density for row in weights}  # a sparse weight has so much less work, whatever is kept
    work = {
        site.name: site.repeats
        * site.dims.rows
        * site.dims.m
        * site.dims.n
        * (density.get(site.name.split("#")[0], 1) if isinstance(site.operation, SparseProduct) else 1)
        for site in sites
    }
    saved = sum(row.saved * work[row.name] for row in sparse) / max(1, sum(work.values()))
    return Report(entering=_entering(outputs, sparse), sparse=sparse, dense=dense, saved=saved, weights=tuple(weights))


def _entering(outputs: Outputs | None, sparse: tuple[SparseRow, ...]) -> str:
    if outputs is None or outputs.sparsifier is None:
        return ""
    said = (
        f"{outputs.name}: {outputs.sparsifier}, once, of the gradient where it enters, {outputs.rows} rows of "
        f"{outputs.n} entries."
    )
    return said if sparse else f"{said} No site is sparse: its noise is paid for, and nothing is saved."


def _sparse_row(site: Site, backend: str | None) -> SparseRow:
    assert site.sparsifier is not None
    assert site.operation is not None
    dims, p = site.dims, _abstract_result(site)
    paths = [path_of(q, site.operation, site.found.lhs.shape, site.found.rhs.shape, backend) for q in p.parts]
    shares = [
        1.0 if path is Path.DENSE or not _skips(q, backend) else q.kept_share()
        for q, path in zip(p.parts, paths, strict=True)
    ]
    return SparseRow(
        name=site.name,
        contraction=_shapes(site),
        rows=dims.rows,
        m=dims.m,
        n=dims.n,
        sparsifier=site.sparsifier.name,
        keeps=p.describe(),
        k=getattr(p, "kept_per_group", None),
        rows_per_group=getattr(p, "rows_per_group", None),
        one_group=p.columns_are_shared,
        backend=_chosen(site, p, paths, backend),
        saved=1 - sum(1.0 if share is None else share for share in shares) / 2,
        skips=" and ".join(dict.fromkeys(q.skips for q, share in zip(p.parts, shares, strict=True) if share is None)),
        instances=math.prod(site.instances),
        warning=_warning(site, p, paths, backend),
    )


def _chosen(site: Site, p: Format, paths: list[Path], backend: str | None) -> str:
    """Say which backend runs the products, on which path, and up to which share of the rows if that tells."""
    if isinstance(site.operation, SparseProduct):
        return "by its entries"
    names = []
    for q, path in zip(p.parts, paths, strict=True):
        kernel = "xla, 8 bits" if _in_8_bits(q) else backend or _fastest(site, q)
        if path is Path.EXAMPLES:
            names.append(_by_examples(site, q, backend))
            continue
        labels = {Path.ROWS: kernel, Path.PATCHES: f"{kernel}, patches", Path.NARROW: "xla, narrow"}
        names.append(labels.get(path, "xla, dense"))
    return names[0] if names[0] == names[1] else f"dx {names[0]}; dw {names[1]}"


def _fastest(site: Site, p: Format) -> str:
    layer = _layer(site, p)
    if layer is not None:
        return fastest_first(layer)[0]
    if p.brings_products:
        return "its own"
    if not kernels.skips(p):
        return "xla, dense"
    backend = "native" if kernels.skips_natively() else "xla"
    return f"{backend}, below {kernels.pays_below(p):.0%} of the {p.skips}"


def _by_examples(site: Site, p: Format, backend: str | None) -> str:
    if isinstance(p, Dense):
        return "native, all images"
    assert site.operation is not None
    assert isinstance(p, Rows)
    how = site.operation.examples(site.found.lhs.shape, site.found.rhs.shape, p.values.dtype, backend)
    assert how is not None
    what = "images" if site.found.primitive == "conv_general_dilated" else "rows"
    below = "" if how.backend == "native" else f", below {kernels.pays_below(p):.0%} of the {what}"
    return f"{how.backend}, {what} that are kept{below}"


def _skips(p: Format, backend: str | None) -> bool:
    """Whether products leave out what is 0 here."""
    if isinstance(p, Entries) and backend is not None:
        return backend == "native" and p.bits is None
    return kernels.skips(p)


def _warning(site: Site, p: Format, paths: list[Path], backend: str | None) -> str:
    if isinstance(site.operation, SparseProduct):
        return "its weight is sparse, and its products are those of the entries, whatever is kept of the gradient."
    layer = _layer(site, p)
    # A part that keeps everything is dense on purpose.
    whole = [q for q, path in zip(p.parts, paths, strict=True) if path is Path.DENSE and q.kept_share() != 1]
    if not whole and any(isinstance(q, Entries) for q in p.parts):
        return _warning_of_entries(p, paths, backend)
    if not whole:
        return warning(layer, backend) if layer is not None and paths == [Path.ROWS, Path.ROWS] else ""
    slower = (
        "its products run whole, on the sparse gradient, which is slower than the dense backward (by the selection): "
    )
    if not all(q.has_products or q.columns_are_shared for q in whole):
        return f"{slower}{type(whole[0]).__name__} has no products of its own."
    if backend == "dense":
        return f'{slower}backend="dense" asks for it.'
    if any(isinstance(q, Rows) for q in whole):
        return _WHOLE_EXAMPLES
    if not any(q.pays_on_patches for q in whole):
        skipped = whole[0].skips
        return f"its products run whole: {skipped} are left out of matrix products, and not yet of other contractions."
    assert site.operation is not None
    if site.found.primitive == "conv_general_dilated" and backend is None and site.operation.narrows:
        return (
            "it is slower than the dense backward (by the selection): its products run whole, on the sparse "
            "gradient, as products on patches are not measured to be faster for a convolution of this kind here. "
            "rows_per_group=None makes it smaller convolutions; msbp.dense() leaves it out."
        )
    return f"{slower}a grouped contraction gains nothing from groups of rows. msbp.dense() leaves it out."


def _in_8_bits(p: Format) -> bool:
    return isinstance(p, Entries) and p.bits is not None


def _warning_of_entries(p: Format, paths: list[Path], backend: str | None) -> str:
    for q, path in zip(p.parts, paths, strict=True):
        if _in_8_bits(q) and path is Path.DENSE:
            return (
                "its products run whole, in floats: 8 bits are for matrix products, and not yet for other contractions."
            )
        if _in_8_bits(q) and kernels.emulates_8_bits():
            return "a CPU emulates 8-bit products, with equal results and no faster than dense."
        if _in_8_bits(q) and target.platform() == "gpu":
            return (
                "the backward is probably no faster than the dense one, as measured on an H200 (0.86 and 0.98 times)."
            )
        if _in_8_bits(q) or q.kept_share() == 1 or _skips(q, backend):
            continue
        if backend is None and kernels.pays_below(q) > 0:
            return "its products run whole, on the sparse gradient: so many entries are kept that it is faster."
        if isinstance(q, Entries):
            return (
                "its products run whole, on the sparse gradient, which is slower than the dense backward (by the "
                "drawing): only native kernels leave out single entries, on a CPU, in float32 and bfloat16, up to 2^31 "
                "of them."
            )
    return ""


def _layer(site: Site, p: Format) -> Layer | None:
    """Return the sizes, for which there is a cost model; None for a format of another kind."""
    return layer_of(p, site.dims.m) if isinstance(p, Columns) else None


def _abstract_result(site: Site) -> Format:
    """Return what the sparsifier makes, in shapes and dtypes."""
    sparsifier, aval = site.sparsifier, site.cotangent
    assert sparsifier is not None
    norms = abstract_norms(sparsifier.wants, aval)
    p: Format = jax.eval_shape(lambda u, seen: sparsifier.apply(u, sparsifier.init(aval), **seen), aval, norms)[0]
    return p


def _shapes(site: Site) -> str:
    lhs, rhs = ("x".join(map(str, aval.shape)) or "scalar" for aval in (site.found.lhs, site.found.rhs))
    return f"{lhs} . {rhs}"


def _skipped(report: Report) -> list[str]:
    """Return what is left out as only the run tells, each once."""
    return list(dict.fromkeys(row.skips for row in report.sparse if row.skips))


def _sparse_table(report: Report) -> Table:
    title = f"Sparse backward: {report.saved:.1%} of all backward multiply-adds saved"
    title += "".join(f", and the share of the {skipped} that are left out" for skipped in _skipped(report))
    table = Table(title=title, title_justify="left")
    for heading in ("site", "contraction", "sparsifier", "keeps", "rows/group", "memories", "backend", "saved"):
        table.add_column(heading, overflow="fold")
    for row in report.sparse:
        group = "None" if row.one_group else "-" if row.rows_per_group is None else str(row.rows_per_group)
        saved = f"by {row.skips}" if row.skips else f"{row.saved:.1%}"
        cells = (row.keeps, group, str(row.instances), row.backend, saved)
        table.add_row(row.name, row.contraction, row.sparsifier, *cells)
    return table


def _weights_table(rows: tuple[WeightRow, ...]) -> Table:
    table = Table(title="Sparse weights, forward and backward", title_justify="left")
    for heading in ("weight", "shape", "entries", "density", "products", "backend"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        table.add_row(row.name, shape, str(row.entries), f"{row.density:.1%}", str(row.products), row.backend)
    return table


def _dense_table(rows: tuple[DenseRow, ...]) -> Table:
    table = Table(title="Dense backward", title_justify="left")
    for heading in ("site", "contraction", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.contraction, row.reason)
    return table
