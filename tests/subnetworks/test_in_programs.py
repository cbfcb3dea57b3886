"""Training by small parts in programs as users have them: NNX with statistics and dropout, rows on many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_subnetwork import CLOSE, KEY, PARAMS, ROWS, WANTED, small, squares

import msbp_jax as msbp


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)
        self.last = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm(self.first(x), use_running_average=rngs is None))
        return self.last(self.dropout(x, rngs=rngs, deterministic=rngs is None))


GRAPH, NET, STATS = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)


def net(variables, x, rngs=None):
    model = nnx.merge(GRAPH, variables["params"], variables["batch_stats"], copy=True)
    return model(x, rngs), nnx.state(model, nnx.BatchStat)


def loss_fn(model, params, stats, key, x, y):
    out, changed = model({"params": params, "batch_stats": model.narrow(stats)}, x, nnx.Rngs(key))
    return ((out - y) ** 2).mean(), model.widen(stats, changed)


@jax.numpy_dtype_promotion("standard")  # which Adam needs
def test_nnx_with_statistics_and_dropout():
    """Statistics of the units that were drawn move, as those of the small network do; the others stand still."""
    variables = {"params": NET, "batch_stats": STATS}
    units = msbp.find_units(lambda v, x: net(v, x)[0], variables, ROWS)
    assert list(units) == ["norm"]
    assert {axis.path for axis in units["norm"].axes} >= {"norm/mean", "norm/scale", "first/kernel", "last/kernel"}
    sub = msbp.subnetwork(net, units=units, budget=0.25)
    structure, tx = sub.init(variables, ROWS), optax.adam(1e-2)
    sample = sub.sample(structure, KEY)

    @jax.jit
    def step(params, stats, opt_state, structure, sample, key):
        run = sub.value_and_grad(loss_fn, has_aux=True, kept_only=True)
        (loss, stats), grads, of_structure = run(params, structure, sample, stats, key, ROWS, WANTED)
        params, opt_state = sub.update_kept(tx, grads, opt_state, params, sample.first)
        return params, stats, opt_state, sub.update(of_structure, structure), loss

    params, stats, _, _, loss = step(NET, STATS, tx.init(NET), structure, sample, KEY)
    exact = sub.best(structure, variables, KEY, lambda m, v, x: (m(v, x)[0] ** 2).mean(), ROWS, candidates=2)
    assert sum(exact.counts().values()) == exact.capacities["norm"]
    drawn = np.asarray(sample.first.masks(units, drawn=True)["norm"])
    moved = np.asarray(stats["norm"]["mean"].get_value() != STATS["norm"]["mean"].get_value())
    np.testing.assert_array_equal(moved, drawn)
    assert np.isfinite(loss)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, NET)
    _, little = sub.extract({"params": params, "batch_stats": stats}, exact)
    model = nnx.merge(GRAPH, little["params"], little["batch_stats"])
    assert model.first.kernel.shape == (4, exact.capacities["norm"])
    CLOSE(model(ROWS), net(sub.masked({"params": params, "batch_stats": stats}, exact), ROWS)[0])


def test_what_returns_its_statistics_has_no_units_and_is_told_so():
    units = msbp.find_units(net, {"params": NET, "batch_stats": STATS}, ROWS)
    with pytest.raises(ValueError, match=r"found nothing that can be left out:\n(.|\n)*searched without them"):
        msbp.subnetwork(net, units=units, budget=0.25)


@jax.numpy_dtype_promotion("standard")  # which Adam needs
def test_rows_on_many_devices():
    """The same step as on one device: losses, gradients and the structure; parameters are on all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    on = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    sub = small()
    structure = sub.init(PARAMS, ROWS)
    sample = sub.sample(structure, KEY)

    @jax.jit
    def step(params, structure, sample, x, y):
        loss, grads, of_structure = sub.value_and_grad(squares)(params, structure, sample, x, y)
        return loss, grads, sub.update(of_structure, structure)

    expected = step(PARAMS, structure, sample, ROWS, WANTED)
    got = step(on(PARAMS), on(structure), on(sample), on(ROWS, "data"), on(WANTED, "data"))
    CLOSE(got, expected)
    # And what comes out draws as what never left one device.
    again, alone = (sub.sample(found[2], jax.random.key(9)) for found in (got, expected))
    assert again.first.counts() == alone.first.counts()
