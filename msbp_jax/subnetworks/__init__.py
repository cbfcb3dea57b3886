"""Subnetworks: units that are drawn at every step, so that forward and backward are those of a smaller network."""

from msbp_jax.subnetworks._find import find_units as find_units
from msbp_jax.subnetworks._model import Narrow as Narrow
from msbp_jax.subnetworks._narrow import Chosen as Chosen
from msbp_jax.subnetworks._sample import Sample as Sample
from msbp_jax.subnetworks._structure import Structure as Structure
from msbp_jax.subnetworks._subnetwork import Subnetwork as Subnetwork
from msbp_jax.subnetworks._units import Axis as Axis
from msbp_jax.subnetworks._units import Group as Group
from msbp_jax.subnetworks._units import Units as Units
from msbp_jax.subnetworks.subnetwork import subnetwork as subnetwork
