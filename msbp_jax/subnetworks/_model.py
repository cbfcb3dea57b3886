"""The model at a sample's widths: a Linen module that is built anew, or the function itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from msbp_jax.subnetworks import _narrow
from msbp_jax.subnetworks._find import blocked_axes, built, is_factory
from msbp_jax.subnetworks._narrow import Chosen, chosen_of
from msbp_jax.subnetworks._units import Units


class Narrow(NamedTuple):
    """The model at a sample's widths, as a loss function gets it.

    Attributes:
      model: The Linen module of these widths, or the function.
      units: Where units are.
      chosen: The sample.
    """

    model: Any
    units: Units
    chosen: Chosen

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns with narrow parameters."""
        return self.model(params, *args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's `apply` returns with narrow variables."""
        return self.model.apply(variables, *args, **kwargs)

    def narrow(self, tree: Any) -> Any:
        """Return another pytree, batch statistics for example, with the slices of this sample."""
        return _narrow.narrow(self.units, tree, self.chosen)

    def widen(self, tree: Any, narrowed: Any) -> Any:
        """Return such a pytree with these slices replaced."""
        return _narrow.widen(self.units, tree, narrowed, self.chosen)


class Models:
    """The models of all widths.

    Args:
      target: A function, or a factory of modules.
      widths: Full widths of a factory, where these are not what the first axis of each group says.
    """

    def __init__(self, target: Any, widths: dict[str, int] | None) -> None:
        self.target = target
        self._widths = widths or {}
        self._is_factory = is_factory(target)

    def of(self, units: Units, counts: Mapping[str, int]) -> Any:
        """Return the model with so many units of each group."""
        if not self._is_factory:
            return self.target
        whole = self.full(units)
        return built(self.target, whole | {n: whole[n] * counts[n] // group.size for n, group in units.items()})

    def full(self, units: Units) -> dict[str, int]:
        """Return the full widths of a factory; none of a function."""
        if not self._is_factory:
            return {}
        own = {name: group.size * group.axes[0].inner for name, group in units.items()}
        return own | dict(units.widths) | self._widths

    def at(self, units: Units, chosen: Chosen) -> Narrow:
        """Return the model of a sample, as loss functions get it."""
        return Narrow(self.of(units, chosen.capacities), units, chosen)

    def check(self, units: Units, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise unless the model runs with fewer units of each group, and does nothing with all of them together.

        Raises:
          ValueError: It does not. What the model raises in full is raised as it is.
        """
        full = self.full(units)
        for name, axis, reason in blocked_axes(self.target, units, full, params, args, kwargs):
            raise ValueError(
                f"The units of {name!r} cannot be left out: {axis}: {reason}. msbp.find_units says which can."
            )
        for name, group in units.items():
            counts = {other: of.size for other, of in units.items()} | {name: max(1, group.size // 2)}
            chosen = chosen_of({n: np.arange(units[n].size) < count for n, count in counts.items()}, counts)

            def run(params: Any, chosen: Chosen = chosen) -> Any:
                model, narrowed = self.at(units, chosen), _narrow.narrow(units, params, chosen)
                return (model.apply if self._is_factory else model)(narrowed, *args, **kwargs)

            try:
                jax.eval_shape(run, params)
            except Exception as error:
                raise ValueError(
                    f"With {counts[name]} of the {group.size} units of {name!r} the model does not run: its units are "
                    f"not all declared, or cannot be tied. msbp.find_units says how they are. {type(error).__name__}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
