"""Run the demo: `python -m msbp_jax.demo`."""

import sys

from msbp_jax.demo.cli import main

sys.exit(main())
