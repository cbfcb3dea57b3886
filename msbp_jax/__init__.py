"""Sparse backpropagation for JAX and Flax, which can remember what it leaves out.

In the order of the data's path: wrap a model, choose what its backward propagates, train.
"""

from importlib import metadata as _metadata

from msbp_jax import nnx as nnx
from msbp_jax import testing as testing
from msbp_jax._freed_memory import keep_freed_memory as keep_freed_memory
from msbp_jax.dynamic import SparsitySchedule as SparsitySchedule
from msbp_jax.dynamic import SparsityState as SparsityState
from msbp_jax.dynamic import gradual_pruning as gradual_pruning
from msbp_jax.dynamic import rigl as rigl
from msbp_jax.dynamic import sparse_evolution as sparse_evolution
from msbp_jax.dynamic import static_sparsity as static_sparsity
from msbp_jax.formats import Columns as Columns
from msbp_jax.formats import Dense as Dense
from msbp_jax.formats import Entries as Entries
from msbp_jax.formats import Format as Format
from msbp_jax.formats import Rows as Rows
from msbp_jax.formats import Split as Split
from msbp_jax.formats import take_columns as take_columns
from msbp_jax.kernels import backends as backends
from msbp_jax.memory import MemorizedState as MemorizedState
from msbp_jax.memory import memorized as memorized
from msbp_jax.sparsifiers import EntriesState as EntriesState
from msbp_jax.sparsifiers import QuantizedState as QuantizedState
from msbp_jax.sparsifiers import RandomKState as RandomKState
from msbp_jax.sparsifiers import SampledRowsState as SampledRowsState
from msbp_jax.sparsifiers import Sparsifier as Sparsifier
from msbp_jax.sparsifiers import SplitState as SplitState
from msbp_jax.sparsifiers import Stays as Stays
from msbp_jax.sparsifiers import Where as Where
from msbp_jax.sparsifiers import dense as dense
from msbp_jax.sparsifiers import dithered as dithered
from msbp_jax.sparsifiers import random_k as random_k
from msbp_jax.sparsifiers import sample_entries as sample_entries
from msbp_jax.sparsifiers import sample_rows as sample_rows
from msbp_jax.sparsifiers import skip_zero_rows as skip_zero_rows
from msbp_jax.sparsifiers import split as split
from msbp_jax.sparsifiers import stochastic_prune as stochastic_prune
from msbp_jax.sparsifiers import top_k as top_k
from msbp_jax.subnetworks import Chosen as Chosen
from msbp_jax.subnetworks import Narrow as Narrow
from msbp_jax.subnetworks import Sample as Sample
from msbp_jax.subnetworks import Structure as Structure
from msbp_jax.subnetworks import Subnetwork as Subnetwork
from msbp_jax.subnetworks import Units as Units
from msbp_jax.subnetworks import find_units as find_units
from msbp_jax.subnetworks import subnetwork as subnetwork
from msbp_jax.training import Diagnosis as Diagnosis
from msbp_jax.training import DynamicScale as DynamicScale
from msbp_jax.training import ScaledStep as ScaledStep
from msbp_jax.training import SiteDiagnosis as SiteDiagnosis
from msbp_jax.training import TrainState as TrainState
from msbp_jax.training import diagnose as diagnose
from msbp_jax.training import metrics as metrics
from msbp_jax.training import train_step as train_step
from msbp_jax.training import value_and_grad as value_and_grad
from msbp_jax.transform import DenseRow as DenseRow
from msbp_jax.transform import Memory as Memory
from msbp_jax.transform import Report as Report
from msbp_jax.transform import SparseFunction as SparseFunction
from msbp_jax.transform import SparseModule as SparseModule
from msbp_jax.transform import SparseNNXModule as SparseNNXModule
from msbp_jax.transform import SparseRow as SparseRow
from msbp_jax.transform import SparseWeightsFunction as SparseWeightsFunction
from msbp_jax.transform import SparseWeightsModule as SparseWeightsModule
from msbp_jax.transform import SparseWeightsNNXModule as SparseWeightsNNXModule
from msbp_jax.transform import Sparsity as Sparsity
from msbp_jax.transform import sparse_vjp as sparse_vjp
from msbp_jax.transform import sparse_weights as sparse_weights
from msbp_jax.weights import Pattern as Pattern
from msbp_jax.weights import densify as densify
from msbp_jax.weights import prune as prune

try:
    __version__ = _metadata.version("msbp-jax")
except _metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
