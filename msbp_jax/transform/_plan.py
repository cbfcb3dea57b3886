"""Which sparsifier a site gets: one for all, or patterns over site names, the first match of which wins."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from msbp_jax import _checks
from msbp_jax.sparsifiers import Sparsifier, skip_zero_rows
from msbp_jax.sparsifiers._base import keeps_state

EVERYTHING = "*"
OUTPUTS = "@outputs"  # the gradient that enters the model


@dataclasses.dataclass(frozen=True)
class Plan:
    """Patterns in their order, and the width below which sparsity does not pay.

    Attributes:
      entries: Pairs of a shell-style pattern (`*` crosses `/`) and a sparsifier.
      min_features: Sites with fewer output features stay dense, unless a pattern other than "*" names them.
    """

    entries: tuple[tuple[str, Sparsifier], ...]
    min_features: int

    @property
    def of_outputs(self) -> Sparsifier | None:
        """The sparsifier of the gradient that enters the model, if there is one."""
        return next((sparsifier for pattern, sparsifier in self.entries if pattern == OUTPUTS), None)

    @property
    def has_state(self) -> bool:
        """Whether a sparsifier of the plan has a state, so that a memory must be carried."""
        return any(keeps_state(sparsifier) for _, sparsifier in self.entries)

    def match(self, name: str) -> tuple[Sparsifier | None, bool]:
        """Return the sparsifier of the first pattern that matches a site's name, or the name without `#2`, `#3`, ...

        A contraction without a parameter has a name that starts with `@`; only a pattern that does so too matches it.
        The second result is whether the pattern names sites at all, rather than everything: `"*"` does not.
        """
        for pattern, sparsifier in self.entries:
            if _matches(pattern, name):
                return sparsifier, pattern != EVERYTHING
        return None, False

    def check_used(self, names: Iterable[str]) -> None:
        """Raise if a pattern matches none of the names, or none that an earlier pattern does not match.

        Raises:
          ValueError: It names the patterns, and the sites that there are.
        """
        known = list(names)
        patterns = [pattern for pattern, _ in self.entries]
        _check_matched([pattern for pattern in patterns if pattern != OUTPUTS], known, "contraction")
        for number, pattern in enumerate(patterns):
            matched = [name for name in known if _matches(pattern, name)]
            before = [next((p for p in patterns[:number] if _matches(p, name)), None) for name in matched]
            if matched and pattern != EVERYTHING and None not in before:
                raise ValueError(
                    f"The pattern {pattern!r} of the plan can never apply: the first match wins, and "
                    f"{', '.join(sorted({repr(p) for p in before}))} stands before it and matches "
                    f"{', '.join(matched)}. Put the specific patterns first."
                )

    def check_known(self, names: Iterable[str]) -> None:
        """Raise if a pattern over parameters matches none of the names of contractions and parameters.

        Raises:
          ValueError: It names the patterns, and the names that there are.
        """
        of_parameters = [pattern for pattern, _ in self.entries if not pattern.startswith("@")]
        _check_matched(of_parameters, list(dict.fromkeys(names)), "contraction or parameter")


def _check_matched(patterns: Sequence[str], known: Sequence[str], what: str) -> None:
    unused = [p for p in patterns if p != EVERYTHING and not any(_matches(p, name) for name in known)]
    if unused:
        raise ValueError(
            f"The plan has patterns that match no {what}: {', '.join(map(repr, unused))}. "
            f"The {what}s of this program are: {', '.join(known) or 'none'}. Mend the pattern, or take it out."
        )


def make_plan(plan: Sparsifier | Mapping[str, Sparsifier], min_features: int) -> Plan:
    """Return a checked plan.

    Raises:
      TypeError: It is neither a sparsifier nor a mapping from patterns to sparsifiers.
      ValueError: It is empty, or `min_features < 1`.
    """
    smallest = _checks.positive_int("min_features", min_features, "sites with fewer output features stay dense")
    if isinstance(plan, Sparsifier) and plan.enters:
        return Plan(((OUTPUTS, plan), (EVERYTHING, skip_zero_rows())), smallest)
    if isinstance(plan, Sparsifier):
        return Plan(((EVERYTHING, plan),), smallest)
    if not isinstance(plan, Mapping):
        raise TypeError(
            "sparse_vjp takes a Sparsifier such as msbp.top_k(density=0.04, rows_per_group=32), or a mapping from "
            f"patterns over site names to sparsifiers, got {plan!r}."
        )
    if not plan:
        raise ValueError('The plan is empty. Give at least one entry, such as {"*": msbp.top_k(density=0.04)}.')
    for pattern, sparsifier in plan.items():
        if not isinstance(pattern, str) or not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"A plan maps str to Sparsifier, got {pattern!r}: {sparsifier!r}.")
    return Plan(tuple(plan.items()), smallest)


def _matches(pattern: str, name: str) -> bool:
    if name.startswith("@") != pattern.startswith("@") or pattern == OUTPUTS:
        return False
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.partition("#")[0], pattern)
