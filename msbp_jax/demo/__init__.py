"""The main job: one network trained three ways, side by side. Run it with `python -m msbp_jax.demo`."""
