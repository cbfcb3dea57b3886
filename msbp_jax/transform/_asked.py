"""What is asked of a report besides what is sparse, checked."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable
from typing import Any, Final

import optax

from msbp_jax import _checks


class NotGiven(enum.Enum):
    """The default of an option that its user may also give as None, for an argument of the model's own."""

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a report besides what is sparse.

    Attributes:
      optimizer: Whose update belongs to a step; None to leave it out.
      share: Share of the rows or entries that is kept where only the run tells, in (0, 1]; None if it is not given.
      measure: Whether steps are timed.
    """

    optimizer: optax.GradientTransformation | None
    share: float | None
    measure: bool


def checked(target: Callable[..., Any], name: str, *, optimizer: object, share: object, measure: object) -> Asked:
    """Return what is asked of a report.

    Args:
      target: What was wrapped, as it is called.
      name: Its name.
      optimizer: As in `Asked`; each of them may be `NOT_GIVEN`, too.
      share: As in `Asked`.
      measure: As in `Asked`.

    Raises:
      TypeError: A value of the wrong type, or the target has an argument of the same name itself.
      ValueError: `share` is out of range.
    """
    options = {"optimizer": optimizer, "share": share, "measure": measure}
    for asked, value in options.items():
        if value is not NOT_GIVEN and _takes(target, asked):
            raise TypeError(
                f"report takes {asked}= for itself, and {name} has an argument {asked!r} too, so that it is not "
                f"clear which is meant by {asked}={_shown(value)}. Pass the model's by position, or wrap a function "
                "that calls it by another name."
            )
    optimizer, share = (None if value is NOT_GIVEN else value for value in (optimizer, share))
    measure = False if measure is NOT_GIVEN else measure
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        within = " Pass its .tx." if isinstance(getattr(optimizer, "tx", None), optax.GradientTransformation) else ""
        raise TypeError(f"optimizer must be one of Optax, such as optax.adam(1e-3), got {_shown(optimizer)}.{within}")
    if not isinstance(measure, bool):
        raise TypeError(f"measure must be True or False, got {measure!r}.")
    meaning = "share of the rows or entries that is kept where only the run tells"
    kept = None if share is None else _checks.fraction("share", share, zero=False, meaning=meaning)
    return Asked(optimizer=optimizer, share=kept, measure=measure)


def _shown(value: object) -> str:
    """Return a value for a message: what is large by its type alone."""
    return (
        repr(value)
        if isinstance(value, bool | int | float | str | None)
        else f"an object of the type {type(value).__name__}"
    )


def _takes(target: Callable[..., Any], name: str) -> bool:
    """Whether a callable has an argument of that name, which could be passed by it."""
    try:
        found = inspect.signature(target).parameters.get(name)
    except (TypeError, ValueError):  # built in
        return False
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)
