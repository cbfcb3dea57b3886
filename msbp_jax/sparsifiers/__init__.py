"""What of a gradient is propagated. One file a method; the contract is in `_base.py`."""

from msbp_jax.sparsifiers._base import Sparsifier as Sparsifier
from msbp_jax.sparsifiers._dense import dense as dense
from msbp_jax.sparsifiers._dithered import dithered as dithered
from msbp_jax.sparsifiers._entries import EntriesState as EntriesState
from msbp_jax.sparsifiers._entries import QuantizedState as QuantizedState
from msbp_jax.sparsifiers._random_k import RandomKState as RandomKState
from msbp_jax.sparsifiers._random_k import random_k as random_k
from msbp_jax.sparsifiers._sample_entries import sample_entries as sample_entries
from msbp_jax.sparsifiers._sample_rows import SampledRowsState as SampledRowsState
from msbp_jax.sparsifiers._sample_rows import sample_rows as sample_rows
from msbp_jax.sparsifiers._skip_zero_rows import skip_zero_rows as skip_zero_rows
from msbp_jax.sparsifiers._split import SplitState as SplitState
from msbp_jax.sparsifiers._split import split as split
from msbp_jax.sparsifiers._stochastic_prune import stochastic_prune as stochastic_prune
from msbp_jax.sparsifiers._top_k import top_k as top_k
from msbp_jax.sparsifiers._where import Stays as Stays
from msbp_jax.sparsifiers._where import Where as Where
