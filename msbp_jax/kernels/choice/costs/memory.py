"""The memory that a call gets from the system and gives back: its pages are made anew each time, which takes long.

XLA allocates what a program holds besides arguments and results at once, and each result. What is larger than the C
library keeps for the next time goes back to the system.
"""

from __future__ import annotations

from msbp_jax.kernels.choice.costs.equations import Listing
from msbp_jax.kernels.choice.costs.fusion import arrays, sizes_of

KEPT_BYTES = 2**25  # of one allocation, by glibc


def fresh_memory(listed: Listing, *, within: bool = False) -> int:
    """Return the bytes that are got from the system in a call.

    Args:
      listed: The program's equations.
      within: Whether its results are used by a larger program and not returned.
    """
    sizes, results = sizes_of(listed), set() if within else set(listed.results)
    stored = arrays(listed) - results
    held = {token: size for token, size in sizes.items() if token in stored}
    last: dict[int, int] = dict.fromkeys(held, 0)
    for number, equation in enumerate(listed.equations):
        last.update((token, number) for token in equation.inputs if token in held)
    last.update((token, len(listed.equations)) for token in listed.results if token in held)
    ends: dict[int, int] = {}
    for token, number in last.items():
        ends[number] = ends.get(number, 0) + held[token]
    now = most = 0
    for number, equation in enumerate(listed.equations):
        now += sum(held.get(token, 0) for token in equation.outputs)
        most = max(most, now)
        now -= ends.get(number, 0)
    large = [sizes[token] for token in results if token is not None and sizes.get(token, 0) > KEPT_BYTES]
    return (most if most > KEPT_BYTES else 0) + sum(large)
