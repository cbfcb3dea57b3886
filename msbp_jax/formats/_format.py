"""What a compact cotangent must know of itself; all that is asked of one is asked here, and nobody asks what it is."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msbp_jax.formats._groups import Size, finite


class SharedColumns(NamedTuple):
    """A cotangent that is 0 but for a few columns, the same for all rows.

    Attributes:
      features: Which they are, `[k]`, distinct.
      values: Their entries, `[rows, k]`.
    """

    features: Int[Array, " k"]
    values: Float[Array, "rows k"]


class Format(abc.ABC):
    """A compact cotangent: what a sparsifier returns, standing for a matrix `p[rows, n]`.

    A format is an immutable pytree, such as a frozen dataclass under `jax.tree_util.register_dataclass`, which `vmap`,
    `scan` and `jit` take apart and put together; shapes are static. It must say its `shape`, what matrix it stands for,
    and how it changes its dtype. For the rest there are ways that take the matrix itself: a format overrides those
    for which it knows a cheaper one.

    Example:
      Signs with one size for all, in 8 bits; its products are made from the matrix, as it says nothing of them:

      >>> import dataclasses, jax, jax.numpy as jnp, msbp_jax as msbp
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class Signs(msbp.Format):
      ...     signs: jax.Array
      ...     size: jax.Array
      ...     @property
      ...     def shape(self):
      ...         return self.signs.shape
      ...     def materialize(self):
      ...         return self.signs.astype(self.size.dtype) * self.size
      ...     def astype(self, dtype):
      ...         return dataclasses.replace(self, size=self.size.astype(dtype))
      >>> def apply(u, state):
      ...     return Signs(jnp.sign(u).astype(jnp.int8), jnp.abs(u).mean()), state
      >>> signs = msbp.Sparsifier(init=lambda aval: (), apply=apply, name="signs")
      >>> msbp.testing.check_sparsifier(signs)
    """

    if TYPE_CHECKING:  # at run time a property would hide a dataclass's field of this name

        @property
        def shape(self) -> tuple[Size, int]:
            """`(rows, n)` of the cotangent that is represented."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "rows n"]:
        """Return the matrix that it stands for."""

    def factored(self) -> tuple[Float[Array, "rows n"], Float[Array, ""] | None]:
        """Return a matrix of the cotangent's dtype and a factor of all of it, float32 or wider; None for 1.

        A matrix that is exact where its multiple would be rounded keeps its products free of bias.
        """
        return self.materialize(), None

    @abc.abstractmethod
    def astype(self, dtype: jax.typing.DTypeLike) -> Self:
        """Return the same cotangent with values of another floating dtype."""

    def left_of(self, u: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        """Return `u - p`: what is left of the matrix that it was chosen from."""
        return u - self.materialize().astype(u.dtype)

    def sum_left_of(self, u: Float[Array, "rows n"], live: Bool[Array, "rows 1"]) -> Float[Array, " n"]:
        """Return the sum of `u - p` over the rows that take part, entries that are not finite left out.

        Args:
          u: The matrix that it was chosen from, 0 in rows that take no part.
          live: Which rows take part.
        """
        return jnp.where(live, finite(self.left_of(u)), jnp.zeros((), u.dtype)).sum(axis=0)

    def entries(self) -> Float[Array, ""]:
        """Return how many entries it propagates that are not 0, float32."""
        return jnp.sum(self.materialize() != 0, dtype=jnp.float32)

    def joined(self, shape: tuple[Size, int]) -> Format | None:
        """Return one cotangent of equal blocks of consecutive rows; None where only their matrices can be joined.

        Args:
          shape: Of all of them together. The leaves of `self` have a leading axis of blocks, as `vmap` gives them.

        Raises:
          ValueError: The blocks do not fit together.
        """
        del shape
        return None

    @property
    def parts(self) -> tuple[Format, Format]:
        """What the gradient of the inputs sees, and what the gradient of the weight sees."""
        return self, self

    @property
    def columns_are_shared(self) -> bool:
        """Whether it is 0 outside a few columns that are the same for all rows; known from shapes."""
        return False

    def shared_columns(self, dtype: jax.typing.DTypeLike) -> SharedColumns:
        """Return them, where they are shared, with entries of a floating dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not say that rows share columns (to {dtype})")

    @property
    def brings_products(self) -> bool:
        """Whether it has products of its own: `grad_input` and `grad_weight` are overridden."""
        return type(self).grad_input is not Format.grad_input

    @property
    def pays_on_patches(self) -> bool:
        """Whether its products on patches of a convolution's input may be measured to be faster than dense ones."""
        return True

    @property
    def skips(self) -> str:
        """What its products leave out, in a word for the report: rows, entries."""
        return "entries"

    @property
    def has_products(self) -> bool:
        """Whether it, or `msbp_jax.kernels`, has products of it; else the matrix is used, which saves nothing."""
        return self.brings_products

    def grad_input(self, weight: Float[Array, ...], feature_axis: int, **options: Any) -> Float[Array, "rows m"]:
        """Return `dx = p wᵀ`, for a format with products of its own.

        Args:
          weight: As in `msbp_jax.kernels.grad_input`, as all below.
          feature_axis: Where the `n` output features stand in `weight`.
          **options: `precision`, `dtype` of the result, and `backend`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no products of its own")

    def grad_weight(self, inputs: Float[Array, "rows m"], feature_axis: int, **options: Any) -> Float[Array, ...]:
        """Return `dw = xᵀ p`, for a format with products of its own.

        Args:
          inputs: As in `msbp_jax.kernels.grad_weight`, as all below.
          feature_axis: Where the `n` output features stand in the result.
          **options: `precision`, `dtype` of the result, and `backend`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no products of its own")

    def kept_share(self) -> float | None:
        """Return the share of the dense products' multiply-adds that its own take, where shapes tell it; else None."""
        return None

    def share_when_run(self) -> Float[Array, ""] | None:
        """Return the share of the dense products' work that its own take, where only the run of a program tells.

        Where it is large, the dense products of the matrix are taken. None where shapes tell it.
        """
        return None

    def describe(self) -> str:
        """Say what of the matrix is kept, as far as shapes tell: a cell of the report."""
        return "?"

    def faults(self, u: jax.Array, *, exact: bool) -> list[str]:
        """Say what is wrong with it as what was kept of `u`, for `msbp.testing.check_sparsifier`.

        Args:
          u: A concrete matrix.
          exact: Whether what it keeps must be entries of `u`: the sparsifier has no state.
        """
        del u, exact
        return []
