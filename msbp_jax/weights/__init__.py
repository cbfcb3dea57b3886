"""Sparse weights: a pattern of entries and their values, and how dense parameters become such and dense again."""

from msbp_jax.weights._pattern import Pattern as Pattern
from msbp_jax.weights._pattern import gathered as gathered
from msbp_jax.weights._pattern import is_pattern as is_pattern
from msbp_jax.weights._pattern import of_layers as of_layers
from msbp_jax.weights._pattern import pattern_of as pattern_of
from msbp_jax.weights._pattern import scattered as scattered
from msbp_jax.weights._prune import SPARSITY as SPARSITY
from msbp_jax.weights._prune import densify as densify
from msbp_jax.weights._prune import prune as prune
from msbp_jax.weights._sparse_weight import SparseWeight as SparseWeight
from msbp_jax.weights._sparse_weight import is_sparse as is_sparse
from msbp_jax.weights._sparse_weight import with_patterns as with_patterns
