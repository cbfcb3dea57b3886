"""Compact cotangents: what a sparsifier returns and the products of a backward are made from, one file a format."""

from msbp_jax.formats._columns import Columns as Columns
from msbp_jax.formats._columns import take_columns as take_columns
from msbp_jax.formats._dense import Dense as Dense
from msbp_jax.formats._entries import Entries as Entries
from msbp_jax.formats._format import Format as Format
from msbp_jax.formats._format import SharedColumns as SharedColumns
from msbp_jax.formats._groups import Size as Size
from msbp_jax.formats._groups import accumulation_dtype as accumulation_dtype
from msbp_jax.formats._groups import finite as finite
from msbp_jax.formats._groups import group_rows as group_rows
from msbp_jax.formats._groups import grouping as grouping
from msbp_jax.formats._rows import Rows as Rows
from msbp_jax.formats._rows import weighed as weighed
from msbp_jax.formats._split import Split as Split
