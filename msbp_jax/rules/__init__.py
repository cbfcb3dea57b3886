"""Custom derivative rules: a plain forward, a sparse backward, and the way state leaves it."""

from msbp_jax.rules._contraction import Contraction as Contraction
from msbp_jax.rules._contraction import Side as Side
from msbp_jax.rules._contraction import contraction as contraction
from msbp_jax.rules._dot_general import DotGeneral as DotGeneral
from msbp_jax.rules._operation import Dims as Dims
from msbp_jax.rules._operation import Operation as Operation
from msbp_jax.rules._operations import CONTRACTIONS as CONTRACTIONS
from msbp_jax.rules._operations import operation_of as operation_of
from msbp_jax.rules._outputs import common_dtype as common_dtype
from msbp_jax.rules._outputs import sparse_outputs as sparse_outputs
from msbp_jax.rules._products import Path as Path
from msbp_jax.rules._products import examples_of as examples_of
from msbp_jax.rules._products import path_of as path_of
from msbp_jax.rules._rule import Rule as Rule
from msbp_jax.rules._rule import Site as Site
from msbp_jax.rules._rule import sparse_contraction as sparse_contraction
from msbp_jax.rules._sparse_product import PRODUCTS as PRODUCTS
from msbp_jax.rules._sparse_product import SparseProduct as SparseProduct
from msbp_jax.rules._sparse_product import sparse_product_of as sparse_product_of
