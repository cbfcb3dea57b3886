"""How state leaves the backward pass: as the cotangent of arguments that are made for it, the carriers."""

from msbp_jax.carriers._leaf import Carriers as Carriers
from msbp_jax.carriers._leaf import given as given
from msbp_jax.carriers._leaf import narrowed as narrowed
from msbp_jax.carriers._marked import Marked as Marked
from msbp_jax.carriers._marked import is_marked as is_marked
from msbp_jax.carriers._marked import plain as plain
from msbp_jax.carriers._members import each_member as each_member
from msbp_jax.carriers._members import member_keys as member_keys
from msbp_jax.carriers._observe import Observer as Observer
from msbp_jax.carriers._observe import branches_of as branches_of
from msbp_jax.carriers._overwriting import OVERWRITE_WITH_GRADIENT as OVERWRITE_WITH_GRADIENT
from msbp_jax.carriers._overwriting import Carried as Carried
from msbp_jax.carriers._overwriting import opened as opened
from msbp_jax.carriers._overwriting import with_memory as with_memory
from msbp_jax.carriers._overwriting import without_memory as without_memory
from msbp_jax.carriers._passage import Passage as Passage
from msbp_jax.carriers._passage import unwrap as unwrap
