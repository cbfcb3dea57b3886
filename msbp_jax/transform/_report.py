"""What a report holds: what a step is expected to gain, what is sparse, and what stays dense, with the reason."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from msbp_jax.transform._report_dict import to_dict
from msbp_jax.transform._report_html import to_html
from msbp_jax.transform._report_text import to_text
from msbp_jax.transform._sparse_uses import WeightRow

if TYPE_CHECKING:  # they are made from programs, and a program knows its report
    from msbp_jax.transform._estimate import LayerEstimate, StepEstimate
    from msbp_jax.transform._measure import Measured


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
      instances: How many layers it is (stacked by a scan, members of a batch), each with a memory if it has one.
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
    """What a step is expected to gain, what is sparse and what is not; `print` it.

    Attributes:
      entering: What is chosen of the gradient where it enters the model ("" if nothing is).
      sparse: The sparse contractions.
      dense: The others.
      saved: Share of the multiply-adds of the whole backward, over all contractions, that is saved, as
        far as shapes tell: what depends on the rows that are left out counts as nothing. It is no speed-up.
      weights: What becomes of weights that are sparse.
      expected: The seconds of a step, plain and sparse, and of each layer's backward, as a cost model expects them;
        None where there is no such model.
      unexpected: Why there is none, "" if there is.
      density: Under which densities, in words ("" where shapes tell them).
      shares: Of each site whose density only the run tells, the share that was counted with.
      measured: What steps took on this machine, of `report(measure=True)`.
      notes: What else is to be said: of the density, of batch norm, of the installation.
    """

    entering: str
    sparse: tuple[SparseRow, ...]
    dense: tuple[DenseRow, ...]
    saved: float
    weights: tuple[WeightRow, ...] = ()
    expected: StepEstimate | None = None
    unexpected: str = ""
    density: str = ""
    shares: tuple[tuple[str, float], ...] = ()
    measured: Measured | None = None
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> dict[str, LayerEstimate]:
        """The expected seconds of each layer's backward, by its name."""
        return {} if self.expected is None else {layer.name: layer for layer in self.expected.layers}

    @property
    def skipped(self) -> tuple[str, ...]:
        """What is left out as only the run tells, each once: "rows", "entries"."""
        return tuple(dict.fromkeys(row.skips for row in self.sparse if row.skips))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in plain Python, as `json.dumps` takes it; times are in seconds.

        Example:
          >>> import jax.numpy as jnp, msbp_jax as msbp
          >>> f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=8))
          >>> report = f.report(jnp.ones((64, 128)), jnp.ones((32, 64)))
          >>> report.to_dict()["sparse"][0]["k"]
          8
        """
        return to_dict(self)

    def __str__(self) -> str:
        """Return it as text, 80 columns wide."""
        return to_text(self)

    def _repr_html_(self) -> str:
        """Return it as tables, for notebooks."""
        return to_html(self)
