"""What a training loop needs: gradients with memory, a state to carry both, a look at how good they are."""

from msbp_jax.training._diagnose import Diagnosis as Diagnosis
from msbp_jax.training._diagnose import SiteDiagnosis as SiteDiagnosis
from msbp_jax.training._diagnose import diagnose as diagnose
from msbp_jax.training._dynamic_scale import DynamicScale as DynamicScale
from msbp_jax.training._dynamic_scale import ScaledStep as ScaledStep
from msbp_jax.training._metrics import metrics as metrics
from msbp_jax.training._train_state import TrainState as TrainState
from msbp_jax.training._train_state import train_step as train_step
from msbp_jax.training._value_and_grad import value_and_grad as value_and_grad
