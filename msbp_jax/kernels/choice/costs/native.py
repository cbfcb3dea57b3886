"""Units of work of the native kernels, by the name of the call and the shapes that it takes."""

from __future__ import annotations

from typing import Any

from msbp_jax.kernels.choice import cpu
from msbp_jax.kernels.choice.costs.equations import Equation, bytes_of, size_of
from msbp_jax.kernels.choice.layer import Layer

type Units = dict[str, tuple[int | float, ...]]


def of_call(equation: Equation, share: float) -> Units:
    """Return the units of a call.

    Args:
      equation: A call of native code; of leading batch axes, all members.
      share: The share of the rows or entries that is not 0.
    """
    target = str(equation.params["target_name"]).removeprefix("msbp_")
    attributes: dict[str, Any] = dict(equation.params["attributes"])
    first = equation.avals[0]
    match target:
        case "select" | "select_with_memory":
            rows, n = first.shape[-2:]
            layer = Layer(rows, 1, n, int(attributes["k"]), int(attributes["rows_per_group"]))
            return _all(equation, 2, f"native {target}", cpu.work("select, native", layer))
        case "grad_input" | "grad_weight":
            groups, rows_per_group, k = first.shape[-3:]
            n, m = _features(equation, bool(attributes["features_last"]))
            layer = Layer(groups * rows_per_group, m, n, k, rows_per_group)
            kind = cpu.kind_of("native", k, rows_per_group)
            return _all(equation, 3, f"{kind} {target}", cpu.work(kind, layer))
        case "rows_grad_input" | "rows_grad_weight":
            rows, n = first.shape[-2:]
            m = equation.avals[-1].shape[-1] if target.endswith("weight") else equation.results[0].shape[-1]
            kept = share * rows
            return _all(equation, 2, f"native {target}", (1, kept * m * n, kept * (m + n), m * n + rows * m))
        case "entries_grad_input" | "entries_grad_weight":
            rows, n = first.shape[-2:]
            m = equation.avals[-1].shape[-1] if target.endswith("weight") else equation.results[0].shape[-1]
            return _all(equation, 2, f"native {target}", (1, share * rows * n * m, rows * n, m * n + rows * m))
        case "images_grad_input" | "images_grad_weight":
            return _of_images(equation, target, share)
        case "dither" | "row_moments" | "live_rows":
            read = size_of(first) if target != "live_rows" else first.shape[-2] + (1 - share) * size_of(first)
            return {f"native {target}": (1, read)}
        case _:
            return {"copy": (1, sum(map(bytes_of, (*equation.avals, *equation.results))))}


def _of_images(equation: Equation, target: str, share: float) -> Units:
    """Return multiply-adds of the images that are kept, with those that fill up a register block, and bytes of them."""
    g, _, other = equation.avals
    (result,) = equation.results
    images, kernel = (other, result) if target.endswith("weight") else (result, other)
    height, width, m, n = kernel.shape[-4:]
    panels = lambda size: -(-size // 32) * 32
    padded = panels(n) * max(m, 6) if target.endswith("weight") else n * panels(m)
    positions = size_of(g) // n
    return {
        f"native {target}": (
            1,
            share * positions * height * width * padded,
            share * (bytes_of(g) + bytes_of(images)),
        )
    }


def _features(equation: Equation, features_last: bool) -> tuple[int, int]:
    """Return the output and the input features of a product with a weight."""
    weight = equation.avals[-1] if equation.params["target_name"] == "msbp_grad_input" else equation.results[0]
    m, n = weight.shape[-2:]
    return (n, m) if features_last else (m, n)


def _all(equation: Equation, rank: int, kind: str, units: tuple[int | float, ...]) -> Units:
    """Return the units of all members of a batch."""
    members = 1
    for size in equation.avals[0].shape[:-rank]:
        members *= size
    return {kind: tuple(members * unit for unit in units)}
