"""The rows of a report: what becomes of each contraction."""

from __future__ import annotations

import math

from msbp_jax import kernels
from msbp_jax.formats import Columns, Dense, Entries, Format, Rows
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.choice.advice import warning
from msbp_jax.kernels.choice.layer import Layer, layer_of
from msbp_jax.kernels.choice.order import fastest_first
from msbp_jax.rules import Path, SparseProduct, examples_of, path_of
from msbp_jax.transform._outputs import Outputs
from msbp_jax.transform._remembers import abstract_result
from msbp_jax.transform._report import DenseRow, SparseRow
from msbp_jax.transform._sites import Site


def entering(outputs: Outputs | None, sparse: tuple[SparseRow, ...]) -> str:
    """Say what is chosen of the gradient where it enters, "" if nothing is."""
    if outputs is None or outputs.sparsifier is None:
        return ""
    said = (
        f"{outputs.name}: {outputs.sparsifier}, once, of the gradient where it enters, {outputs.rows} rows of "
        f"{outputs.n} entries."
    )
    return said if sparse else f"{said} No site is sparse: its noise is paid for, and nothing is saved."


def dense_row(site: Site) -> DenseRow:
    """Return the row of a contraction that stays dense."""
    return DenseRow(name=site.name, contraction=_shapes(site), reason=site.reason)


def sparse_row(site: Site, backend: str | None) -> SparseRow:
    """Return the row of a contraction with a sparse backward.

    Args:
      site: The contraction.
      backend: Which one `sparse_vjp` was asked for; None to choose.
    """
    assert site.sparsifier is not None
    assert site.operation is not None
    dims, p = site.dims, abstract_result(site)
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
    how = examples_of(p, site.operation, site.found.lhs.shape, site.found.rhs.shape, backend)
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
    if isinstance(whole[0], Rows):
        return _why_whole(site, whole[0])
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


def _why_whole(site: Site, p: Rows) -> str:
    """Say why no example is left out of a contraction that is no product of matrices."""
    whole = "its products run whole: "
    if not kernels.skips(p):
        return f"{whole}so many rows are kept that it is faster."
    each = site.dims.rows_per_example
    if p.drawn_together is not None and p.drawn_together % each:
        return (
            f"{whole}an example is computed if any of its {each} rows is kept, and {p.drawn_together} at a time are "
            'drawn. rows_per_group="example" draws whole examples.'
        )
    if site.found.primitive != "conv_general_dilated":
        return f"{whole}experts are numbered from an offset."
    return (
        f"{whole}native kernels leave out images of plain convolutions alone on a CPU (one or two axes of pixels, four "
        "features or more, no groups, not transposed, float32 or bfloat16), as XLA's convolutions in branches take "
        "tens of times as long there."
    )


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


def _shapes(site: Site) -> str:
    lhs, rhs = ("x".join(map(str, aval.shape)) or "scalar" for aval in (site.found.lhs, site.found.rhs))
    return f"{lhs} . {rhs}"
