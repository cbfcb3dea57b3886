"""What of a gradient is propagated. One file a method; the contract is in `_base.py`."""

from msbp_jax.sparsifiers._base import Sparsifier as Sparsifier
from msbp_jax.sparsifiers._dense import dense as dense
from msbp_jax.sparsifiers._random_k import RandomKState as RandomKState
from msbp_jax.sparsifiers._random_k import random_k as random_k
from msbp_jax.sparsifiers._top_k import top_k as top_k
from msbp_jax.sparsifiers._where import Stays as Stays
from msbp_jax.sparsifiers._where import Where as Where
