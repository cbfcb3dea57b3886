"""Sparse training: patterns that change while a model is trained, and an optimizer's state that follows them."""

from msbp_jax.dynamic._evolution import sparse_evolution as sparse_evolution
from msbp_jax.dynamic._gradual import gradual_pruning as gradual_pruning
from msbp_jax.dynamic._rigl import rigl as rigl
from msbp_jax.dynamic._schedule import SparsitySchedule as SparsitySchedule
from msbp_jax.dynamic._schedule import SparsityState as SparsityState
from msbp_jax.dynamic._static import static_sparsity as static_sparsity
