"""Units that are found: what is tied, what cannot be, and the reasons."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msbp_jax as msbp
from msbp_jax.subnetworks import Axis


class CNN(nn.Module):
    """A residual connection, both kinds of norm, a flattened image, dropout."""

    widths: dict

    @nn.compact
    def __call__(self, x, train=False):
        w = self.widths
        x = nn.Conv(w["trunk"], (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(w["inner"], (3, 3))(x)))
        x = nn.max_pool(x + nn.Conv(w["trunk"], (3, 3))(y), (2, 2), (2, 2))
        x = nn.relu(nn.GroupNorm(w["groups"] // 8)(nn.Conv(w["groups"], (3, 3))(x)))
        x = nn.relu(nn.Dense(w["hidden"])(x.reshape(len(x), -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


WIDTHS = {"trunk": 16, "inner": 24, "groups": 32, "hidden": 48}
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
VARIABLES = CNN(WIDTHS).init(jax.random.key(1), X)


def test_a_factory():
    units = msbp.find_units(CNN, VARIABLES, X, widths=WIDTHS)
    assert {name: group.size for name, group in units.items()} == {"trunk": 16, "inner": 24, "groups": 4, "hidden": 48}
    places = lambda name: {(axis.path, axis.axis) for axis in units[name].axes}
    norm = lambda at: {(f"BatchNorm_{at}/{what}", 0) for what in ("scale", "bias", "mean", "var")}
    assert places("inner") == {("Conv_1/kernel", 3), ("Conv_1/bias", 0), ("Conv_2/kernel", 2), *norm(1)}
    assert places("trunk") == {
        ("Conv_0/kernel", 3), ("Conv_0/bias", 0), ("Conv_1/kernel", 2), ("Conv_2/kernel", 3), ("Conv_2/bias", 0),
        ("Conv_3/kernel", 2), *norm(0),
    }  # fmt: skip
    assert Axis("Dense_0/kernel", 0, 8) in units["groups"].axes  # a group of a norm is a unit, at each of 16 positions
    assert "groups: 4 units: " in str(units)
    assert "Conv_3/kernel[3] in 8s" in str(units)


def test_the_same_as_a_function():
    units = msbp.find_units(lambda v, x: CNN(WIDTHS).apply(v, x), VARIABLES, X)
    named = msbp.find_units(CNN, VARIABLES, X, widths=WIDTHS)
    assert {frozenset(group.axes) for group in units.values()} == {frozenset(group.axes) for group in named.values()}
    reasons = dict(units.left)
    assert any("it is an axis of the model's arguments" in reason for reason in reasons.values())
    assert any("it is an axis of the model's results" in reason for reason in reasons.values())
    assert "not " in str(units)


def test_training_mode_ties_the_same():
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
    units = msbp.find_units(CNN, VARIABLES, X, widths=WIDTHS, **options)
    assert units.keys() == WIDTHS.keys()


def test_attention_by_heads():
    def build(widths):
        return nn.MultiHeadDotProductAttention(widths["heads"], qkv_features=8 * widths["heads"], out_features=32)

    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    variables = build({"heads": 4}).init(jax.random.key(1), x)
    units = msbp.find_units(build, variables, x, widths={"heads": 4})
    assert units["heads"].size == 4
    assert {(a.path, a.axis) for a in units["heads"].axes} == {
        *((f"{name}/kernel", 1) for name in ("query", "key", "value")),
        *((f"{name}/bias", 0) for name in ("query", "key", "value")),
        ("out/kernel", 0),
    }
    # The entries of a head are contracted between queries and keys: fewer of them would be another scale.
    assert any("neither operand is a parameter" in reason for _, reason in units.left)


class Normed(nn.Module):
    widths: dict

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(self.widths["stream"])(x))
        y = nn.relu(nn.Dense(self.widths["mlp"])(x))
        x = x + nn.Dense(self.widths["stream"])(y)
        return nn.Dense(3)(x)


def test_a_layer_norm_keeps_its_axis():
    x, widths = jnp.ones((2, 8)), {"stream": 16, "mlp": 32}
    variables = Normed(widths).init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match=r"The width 'stream' changes .*which are not the axes .*reduced by reduce_sum"
    ):
        msbp.find_units(Normed, variables, x, widths=widths)
    units = msbp.find_units(lambda w: Normed({**w, "stream": 16}), variables, x, widths={"mlp": 32})
    assert [(axis.path, axis.axis) for axis in units["mlp"].axes] == [
        ("Dense_1/bias", 0), ("Dense_1/kernel", 1), ("Dense_2/kernel", 0)
    ]  # fmt: skip


PROGRAMS = {
    "a loop over time": (
        lambda p, x: jax.lax.scan(lambda h, row: (jnp.tanh(row @ p["i"] + h @ p["h"]), None),
                                  jnp.zeros((2, p["h"].shape[0])), x)[0] @ p["o"],
        {"i": (4, 12), "h": (12, 12), "o": (12, 3)}, (5, 2, 4), {("i", 1), ("h", 0), ("h", 1), ("o", 0)},
    ),
    "remat, cond, jit": (
        lambda p, x: jax.lax.cond(x.sum() > 0, jax.checkpoint(lambda h: jnp.tanh(h)), lambda h: jax.jit(jnp.abs)(h),
                                  x @ p["i"]) @ p["o"],
        {"i": (4, 12), "o": (12, 3)}, (2, 4), {("i", 1), ("o", 0)},
    ),
    "turned and padded": (
        lambda p, x: jnp.pad((x @ p["i"].T)[:, None], ((0, 0), (1, 0), (0, 0)))[:, 1] @ p["o"],
        {"i": (12, 4), "o": (12, 3)}, (2, 4), {("i", 0), ("o", 0)},
    ),
    "an embedding": (
        lambda p, x: jax.nn.relu(jnp.take(p["t"], jnp.int32(x), axis=0, mode="clip")) @ p["o"],
        {"t": (9, 12), "o": (12, 3)}, (2, 4), {("t", 1), ("o", 0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    f, shapes, shape, want = PROGRAMS[name]
    params = {key: jnp.ones(of) for key, of in shapes.items()}
    (group,) = msbp.find_units(f, params, jnp.ones(shape)).values()
    assert {(axis.path, axis.axis) for axis in group.axes} == want


LEFT = {
    "cut": (lambda h: h[:, :6], "goes through slice"),
    "joined": (lambda h: jnp.concatenate([h, h], 1)[:, :12] * 1, "joined with others"),
    "sorted": (lambda h: jnp.sort(h, axis=1), "goes through sort"),
    "summed along": (lambda h: h * h.sum(1, keepdims=True), "reduced by reduce_sum"),
    "counted along": (lambda h: h * jnp.arange(12.0)[None], "counted by iota"),
    "a constant": (lambda h: h * np.linspace(0, 1, 12, dtype=np.float32)[None], "comes from a constant"),
    "a running sum": (lambda h: jnp.cumsum(h, axis=1), "goes through cumsum"),
    "a while loop": (lambda h: jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h + 1, h), "goes through while"),
    "cut in two ways": (lambda h: h + h.reshape(-1, 3, 4).mT.reshape(-1, 12), "cut in two ways that do not fit"),
    "across its parts": (lambda h: h.reshape(3, 8).reshape(2, 12), "reshaped across its parts"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_a_reason(name):
    within, reason = LEFT[name]
    out = 6 if name == "cut" else 12
    params = {"i": jnp.ones((4, 12)), "o": jnp.ones((out, 3))}
    units = msbp.find_units(lambda p, x: within(x @ p["i"]) @ p["o"], params, jnp.ones((2, 4)))
    assert not units
    assert any(reason in told for _, told in units.left), units.left


def test_a_barrier_ties_nothing():
    f = lambda p, x: sum(h @ w for h, w in zip(
        jax.lax.optimization_barrier((x @ p["a"], x @ p["b"])), (p["c"], p["d"]), strict=True))  # fmt: skip
    params = {"a": jnp.ones((4, 16)), "b": jnp.ones((4, 8)), "c": jnp.ones((16, 3)), "d": jnp.ones((8, 3))}
    assert sorted(group.size for group in msbp.find_units(f, params, jnp.ones((2, 4))).values()) == [8, 16]


def test_a_parameter_that_is_broadcast_reads_nothing():
    f = lambda p, x: jax.nn.sigmoid(x @ p["w"]) @ jnp.broadcast_to(p["c"], (12, 3))
    units = msbp.find_units(f, {"w": jnp.ones((4, 12)), "c": jnp.ones((1, 3))}, jnp.ones((2, 4)))
    assert not units


def test_a_width_that_has_no_half():
    """The first that the module can have is taken."""

    class Grouped(nn.Module):
        widths: dict

        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(num_groups=None, group_size=8)(nn.Dense(self.widths["h"])(x))
            return nn.Dense(3)(x)

    variables = Grouped({"h": 24}).init(jax.random.key(0), jnp.ones((2, 4)))
    units = msbp.find_units(Grouped, variables, jnp.ones((2, 4)), widths={"h": 24})
    assert units["h"].size == 3

    class Fixed(Grouped):
        @nn.compact
        def __call__(self, x):
            if self.widths["h"] != 24:
                raise RuntimeError("there is no other")
            return Grouped.__call__(self, x)

    variables = Fixed({"h": 24}).init(jax.random.key(0), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="With a width 'h' of 12 in place of 24 the module cannot be initialized"):
        msbp.find_units(Fixed, variables, jnp.ones((2, 4)), widths={"h": 24})


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"A factory of modules has widths: find_units\(build, variables"):
        msbp.find_units(CNN, VARIABLES, X)
    with pytest.raises(ValueError, match="The width 'hidden' is 1: there is nothing to choose"):
        msbp.find_units(CNN, VARIABLES, X, widths={**WIDTHS, "hidden": 1})
    with pytest.raises(TypeError, match="A factory takes widths, a dict, and returns a Linen module"):
        msbp.find_units(lambda w: w, VARIABLES, X, widths=WIDTHS)
