"""Custom derivative rules: a plain forward, a sparse backward, and the way state leaves it."""

from msbp_jax.rules._dims import Contraction as Contraction
from msbp_jax.rules._dims import Side as Side
from msbp_jax.rules._dims import contraction as contraction
from msbp_jax.rules._dot_general import Rule as Rule
from msbp_jax.rules._dot_general import sparse_dot_general as sparse_dot_general
from msbp_jax.rules._state import LogKey as LogKey
from msbp_jax.rules._state import SiteLog as SiteLog
from msbp_jax.rules._state import Tracker as Tracker
from msbp_jax.rules._state import branches_of as branches_of
from msbp_jax.rules._state import logged_rank as logged_rank
from msbp_jax.rules._state import unwrap as unwrap
