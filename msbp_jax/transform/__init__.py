"""The transformation: from a model or a function to one with a sparse backward."""

from msbp_jax.transform._function import SparseFunction as SparseFunction
from msbp_jax.transform._linen import SparseModule as SparseModule
from msbp_jax.transform._nnx import Memory as Memory
from msbp_jax.transform._nnx import SparseNNXModule as SparseNNXModule
from msbp_jax.transform._report import DenseRow as DenseRow
from msbp_jax.transform._report import Report as Report
from msbp_jax.transform._report import SparseRow as SparseRow
from msbp_jax.transform._sparse_nnx import SparseWeightsNNXModule as SparseWeightsNNXModule
from msbp_jax.transform._sparse_nnx import Sparsity as Sparsity
from msbp_jax.transform.sparse_vjp import sparse_vjp as sparse_vjp
from msbp_jax.transform.sparse_weights import SparseWeightsFunction as SparseWeightsFunction
from msbp_jax.transform.sparse_weights import SparseWeightsModule as SparseWeightsModule
from msbp_jax.transform.sparse_weights import sparse_weights as sparse_weights
