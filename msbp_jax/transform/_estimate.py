"""What a training step is expected to take: a stand-in that knows no costs and says that all parts take as long."""

from __future__ import annotations

import dataclasses

import optax

from msbp_jax.transform._program import Program


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerEstimate:
    """A layer's backward.

    Attributes:
      name: Of its site.
      dense: Seconds of plain JAX's.
      sparse: Seconds of the sparse one.
    """

    name: str
    dense: float
    sparse: float

    @property
    def speed_up(self) -> float:
        """How many times faster the sparse one is."""
        return self.dense / self.sparse if self.sparse else 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """A training step, in seconds.

    Attributes:
      forward: Of all contractions.
      rest: Everything else, in both passes.
      optimizer: Its update; 0 if none is given.
      layers: The backward of each contraction with a parameter.
    """

    forward: float
    rest: float
    optimizer: float
    layers: tuple[LayerEstimate, ...]

    @property
    def plain(self) -> float:
        """The dense step."""
        return self.forward + self.rest + self.optimizer + sum(layer.dense for layer in self.layers)

    @property
    def sparse(self) -> float:
        """The sparse step."""
        return self.forward + self.rest + self.optimizer + sum(layer.sparse for layer in self.layers)

    @property
    def speed_up(self) -> float:
        """How many times faster the sparse step is."""
        return self.plain / self.sparse if self.sparse else 1.0


def estimate_step(
    program: Program, *, share: float | None = None, optimizer: optax.GradientTransformation | None = None
) -> StepEstimate:
    """Return what a step of a program is expected to take."""
    del share
    layers = tuple(
        LayerEstimate(name=site.name, dense=1e-3, sparse=1e-3) for site in program.sites if site.found.side is not None
    )
    return StepEstimate(forward=1e-3, rest=1e-3, optimizer=0.0 if optimizer is None else 1e-3, layers=layers)
