"""The gradient that enters a model, as something that has a sparsifier: the name "@outputs" of a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax.carriers import Carriers
from msbp_jax.rules import Site as SiteState
from msbp_jax.rules import common_dtype, sparse_outputs
from msbp_jax.sparsifiers import Sparsifier, Stays, Where
from msbp_jax.sparsifiers._base import State, serving
from msbp_jax.transform._plan import OUTPUTS, Plan
from msbp_jax.transform._remembers import Remembers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs(Remembers):
    """Those of a program's results that are the model's floating outputs.

    Attributes:
      sparsifier: Its sparsifier; None where it keeps everything.
      places: Their numbers among the results.
      rows: Size of axis 0, which they share.
      n: Entries of all of them for each row.
      dtype: Of their gradient.
    """

    name: str = OUTPUTS
    sparsifier: Sparsifier | None
    places: tuple[int, ...]
    rows: int
    n: int
    dtype: Any

    @property
    def cotangent(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of all gradients side by side."""
        return jax.ShapeDtypeStruct((self.rows, self.n), self.dtype)

    @property
    def instances(self) -> tuple[int, ...]:
        """None: outputs are not in a loop."""
        return ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that could have a gradient."""
        return 0 in (self.rows, self.n)

    def chosen_from(self, results: Sequence[Any], state: State, carriers: list[Carriers] | None) -> list[Any]:
        """Return the results of a program; of the gradient of these outputs the sparsifier chooses."""
        assert self.sparsifier is not None
        outputs = tuple(results[place] for place in self.places)
        chosen = sparse_outputs(self.sparsifier, outputs, SiteState(state, carriers))
        replaced = dict(zip(self.places, chosen, strict=True))
        return [replaced.get(place, result) for place, result in enumerate(results)]


def find_outputs(
    plan: Plan, results: Sequence[jax.ShapeDtypeStruct], is_output: Sequence[bool], name: str, backend: str | None
) -> Outputs | None:
    """Return the outputs whose gradient a plan names; None if it names none.

    Args:
      plan: The plan.
      results: Shapes and dtypes of the program's results.
      is_output: Which of them are the model's outputs, and not collections that it changes.
      name: What was wrapped, for messages.
      backend: Which one `sparse_vjp` was asked for; None to choose.

    Raises:
      ValueError: There are none that are floating, or they do not share axis 0, or the sparsifier needs what stands at
        sites alone.
    """
    sparsifier = plan.of_outputs
    if sparsifier is None:
        return None
    said = f"{OUTPUTS!r}: {sparsifier}"
    if sparsifier.wants:
        raise ValueError(
            f"Outputs have no operands, and {sparsifier} wants to see {', '.join(sparsifier.wants)} ({said}). Use it "
            "under a pattern over sites."
        )
    floating = [
        place
        for place, (aval, output) in enumerate(zip(results, is_output, strict=True))
        if output and jnp.issubdtype(aval.dtype, jnp.floating)
    ]
    shapes = [results[place].shape for place in floating]
    if () in shapes:
        raise ValueError(
            f"{name} returns a scalar, such as a loss, and rows are to be drawn of the gradient of what it returns "
            f"({said}). Wrap the model without its loss, so that it returns an array with a row for each example, and "
            "compute the loss outside, an auxiliary one too."
        )
    if not floating or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"Rows are drawn over axis 0 of the floating outputs ({said}), which must all share it, got outputs of "
            f"shapes {shapes} from {name}. Give the sparsifier under a pattern over sites instead, where each draws "
            "for itself, or wrap a function that returns those outputs alone that have a row for each example."
        )
    rows, n = shapes[0][0], sum(math.prod(shape[1:]) for shape in shapes)
    dtype = common_dtype([results[place].dtype for place in floating])
    serves = serving(sparsifier, Where(rows=rows, n=n, m=0, dtype=dtype, backend=backend))
    kept = None if isinstance(serves, Stays) else serves
    return Outputs(sparsifier=kept, places=tuple(floating), rows=rows, n=n, dtype=dtype)
