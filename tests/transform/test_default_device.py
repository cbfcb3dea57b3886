"""The kernels are chosen for the device that a program is for, which `jax.default_device` may say."""

import jax
import jax.numpy as jnp
import pytest

import msbp_jax as msbp
from msbp_jax.kernels.choice import target

W, X = jnp.ones((8, 64)), jnp.ones((6, 8))


@pytest.mark.parametrize("chosen", ["cpu", None])
def test_a_cpu_chosen_on_a_host_with_another_default(chosen, monkeypatch):
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=6))
    cpu = chosen or jax.devices("cpu")[3]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert target.platform() == "gpu"
    with jax.default_device(cpu):
        assert target.platform() == "cpu"
        assert target.names() == {"cpu"}
        assert f.report(W, X).sparse[0].backend in ("native", "xla")
        _, grads, _ = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).mean())(W, f.init_memory(W, X), X)
    assert grads.any()
    assert target.platform() == "gpu"


def test_a_device_that_is_chosen_holds_the_results():
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=6), 0.8))
    device = jax.devices()[5]
    with jax.default_device(device):
        w, x = jnp.ones((8, 64)), jnp.ones((6, 8))
        results = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).mean())(w, f.init_memory(w, x), x)
    assert {d for leaf in jax.tree.leaves(results) for d in leaf.devices()} == {device}
