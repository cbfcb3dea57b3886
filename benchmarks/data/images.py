"""Images and their classes, in two parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    """Floats of one shape for each image, and its class.

    Attributes:
      name: What it is.
      train_x: `[examples, ...]`, float32.
      train_y: `[examples]`, int32.
      test_x: `[examples, ...]`, float32.
      test_y: `[examples]`, int32.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
