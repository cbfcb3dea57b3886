"""Every import and every fact that depends on the JAX version, and nothing else.

JAX moves its jaxpr internals between releases. Whoever ports the library to a new JAX reads this folder, and only
this folder, to see what it stands on. All names are public ones of JAX (`jax.extend.core`, `jax.core`); the helpers
hide layouts of parameters that have changed before.
"""

from __future__ import annotations

from jax.core import Tracer as Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.custom_derivatives import CustomVJPPrimal as CustomVJPPrimal
from jax.custom_derivatives import SymbolicZero as SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning as custom_partitioning
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import Var as Var
from jax.extend.core import jaxprs_in_params as jaxprs_in_params
from jax.extend.core.primitives import closed_call_p as closed_call_p
from jax.extend.core.primitives import cond_p as cond_p
from jax.extend.core.primitives import custom_jvp_call_p as custom_jvp_call_p
from jax.extend.core.primitives import custom_vjp_call_p as custom_vjp_call_p
from jax.extend.core.primitives import dynamic_slice_p as dynamic_slice_p
from jax.extend.core.primitives import gather_p as gather_p
from jax.extend.core.primitives import jit_p as jit_p
from jax.extend.core.primitives import remat_p as remat_p
from jax.extend.core.primitives import scan_p as scan_p
from jax.extend.core.primitives import while_p as while_p
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

from msbp_jax._compat._derivatives import define_vjp_with_logs as define_vjp_with_logs
from msbp_jax._compat._derivatives import is_made_here as is_made_here
from msbp_jax._compat._derivatives import is_primal as is_primal
from msbp_jax._compat._derivatives import is_symbolic_zero as is_symbolic_zero
from msbp_jax._compat._derivatives import pull_back_with_logs as pull_back_with_logs
from msbp_jax._compat._derivatives import split_branch_log as split_branch_log
from msbp_jax._compat._derivatives import under_differentiation as under_differentiation
from msbp_jax._compat._files import exporting as exporting
from msbp_jax._compat._files import is_symbolic as is_symbolic
from msbp_jax._compat._files import serializable as serializable
from msbp_jax._compat._meshes import all_axes_manual as all_axes_manual
from msbp_jax._compat._meshes import axes_lacked as axes_lacked
from msbp_jax._compat._meshes import axes_of_collective as axes_of_collective
from msbp_jax._compat._meshes import axes_of_spec as axes_of_spec
from msbp_jax._compat._meshes import call_varying as call_varying
from msbp_jax._compat._meshes import new_mesh_axes as new_mesh_axes
from msbp_jax._compat._meshes import no_mesh as no_mesh
from msbp_jax._compat._meshes import placed_like as placed_like
from msbp_jax._compat._meshes import shard_map_like as shard_map_like
from msbp_jax._compat._meshes import typed_like as typed_like
from msbp_jax._compat._meshes import varies as varies
from msbp_jax._compat._meshes import varying_alike as varying_alike
from msbp_jax._compat._meshes import varying_axes as varying_axes
from msbp_jax._compat._meshes import varying_like as varying_like
from msbp_jax._compat._meshes import varying_over as varying_over
from msbp_jax._compat._meshes import with_automatic_sharding as with_automatic_sharding
from msbp_jax._compat._meshes import zeros_placed_like as zeros_placed_like
from msbp_jax._compat._programs import closed as closed
from msbp_jax._compat._programs import constrained as constrained
from msbp_jax._compat._programs import context_of as context_of
from msbp_jax._compat._programs import is_key as is_key
from msbp_jax._compat._programs import jit_like as jit_like
from msbp_jax._compat._programs import left_alone as left_alone
from msbp_jax._compat._programs import make_jaxpr as make_jaxpr
from msbp_jax._compat._programs import mesh_of as mesh_of
from msbp_jax._compat._programs import scan_arity as scan_arity
from msbp_jax._compat._programs import shape_of as shape_of
from msbp_jax._compat._programs import single_equation as single_equation
