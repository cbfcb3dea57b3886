"""`subnetwork`: training in which forward and backward are those of a small network, drawn anew at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from msbp_jax import _checks
from msbp_jax.subnetworks._subnetwork import Budget, Subnetwork
from msbp_jax.subnetworks._units import Units


def subnetwork(
    target: Any,
    *,
    units: Any,
    budget: Budget,
    widths: Mapping[str, int] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    alpha: float = 0.5,
    rung_ratio: float = 1.25,
) -> Subnetwork:
    """Return what trains a network by small parts of it, and learns which units are worth keeping (VR-PGE).

        min over w, s of E[L(w, m)],  m ~ Bernoulli(s),   sum s <= budget,  0 <= s <= 1
        ds ~ ½ (L - L') (m - m') / (s (1 - s))^(1 - alpha)

    Every unit has a probability s. A step draws two samples of units, m and m', and runs the network that is left: it
    is really smaller, and is compiled for a few sizes. Weights follow the first sample's gradient by the chain rule,
    probabilities the difference of the two losses, from two forward passes and no backward. At the end the best sample
    is taken out as a small network.

    Args:
      target: A function `f(params, *args)` that follows the shapes of its parameters (an NNX module is one, by
        `nnx.merge`), or a factory `build(widths)` of Linen modules, as these check shapes.
      units: What `msbp.find_units` returns, or `{group: [(pattern of paths, axis), ...]}`. A factory's widths have the
        names of the groups.
      budget: Share of all units that a sample has on the average, in (0, 1]; an integer above 1 is their number. Or an
        Optax schedule, by the structure's step, of what it begins with: shares, or numbers.
      widths: Full widths of a factory; by default what the first axis of each group says.
      optimizer: Of the probabilities; `optax.adam(12e-3)` by default, the paper's. Others may diverge from a gradient
        whose scale is that of the loss.
      alpha: In [0, 1]: exponent of the preconditioner. At ½ the variance is bounded for s near 0 and 1, at 0 the
        estimate is that of the gradient itself, and is not.
      rung_ratio: Between the capacities that programs are compiled for.

    Returns:
      A `Subnetwork`, whose methods are pure.

    Raises:
      TypeError: `target` is not callable, or units are not declared as above.
      ValueError: A budget, an exponent or a ratio out of range, or units of which there is none.

    Example:
      >>> import jax, jax.numpy as jnp, optax, msbp_jax as msbp
      >>> f = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.ones((4, 64)), "v": jnp.ones((64, 3))}
      >>> sub = msbp.subnetwork(f, units={"hidden": [("w", 1), ("v", 0)]}, budget=0.25)
      >>> structure = sub.init(params)
      >>> sample = sub.sample(structure, jax.random.key(0))
      >>> loss_fn = lambda model, p, x: (model(p, x) ** 2).mean()
      >>> loss, grads, of_structure = sub.value_and_grad(loss_fn)(params, structure, sample, jnp.ones((2, 4)))
      >>> structure = sub.update(of_structure, structure)
      >>> grads["w"].shape, float(structure.probabilities["hidden"].sum()) < 16.001
      ((4, 64), True)

    References:
      Zhou et al., Efficient neural network training via forward and backward propagation sparsification, 2021 (arXiv
      2111.05685).
    """
    if not callable(target):
        raise TypeError(f"subnetwork takes a function f(params, *args) or a factory build(widths), got {target!r}.")
    if isinstance(units, Units) and not units:
        raise ValueError(
            "msbp.find_units found nothing that can be left out:\n"
            f"{units}\nA function that also returns what it changed, batch statistics for example, is searched without "
            "them: msbp.find_units(lambda *args: f(*args)[0], ...)."
        )
    if not isinstance(units, Mapping) or not units:
        raise TypeError(
            f'units must be {{"hidden": [("Dense_0/kernel", 1), ...]}}, or what msbp.find_units returns, got {units!r}.'
        )
    _check_budget(float(budget(0)) if callable(budget) else budget)
    exponent = _checks.fraction("alpha", alpha, zero=True, meaning="exponent of the preconditioner s (1 - s)")
    ratio = _checks.number("rung_ratio", rung_ratio, "between the capacities that programs are compiled for")
    if not 1 < ratio <= 16:
        raise ValueError(f"rung_ratio must lie in (1, 16], got {ratio}.")
    return Subnetwork(
        target, units, budget, None if widths is None else dict(widths), optimizer or optax.adam(12e-3), exponent, ratio
    )


def _check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.number):
        raise TypeError(f"budget must be a number, or an Optax schedule of one, got {budget!r}.")
    if not (0 < budget <= 1 or (budget > 1 and float(budget).is_integer())):
        raise ValueError(f"budget must be a share of the units in (0, 1], or a whole number of them, got {budget}.")
