"""Pruning: which entries are kept, what comes back, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import msbp_jax as msbp
from msbp_jax.weights import pattern_of
from msbp_jax.weights._pattern import check_pattern

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (6, 10))
VARIABLES = {
    "params": {"a": {"kernel": W, "bias": jnp.ones(10)}, "b": {"kernel": 2 * W[:, :4]}},
    "stats": {"mean": 1.0},
}


def test_the_largest_of_each_weight():
    sparse = msbp.prune(VARIABLES, density=0.2)
    assert sparse["params"]["a"]["kernel"].shape == (12,)
    assert sparse["params"]["b"]["kernel"].shape == (5,)
    assert sparse["params"]["a"]["bias"] is VARIABLES["params"]["a"]["bias"]
    assert sparse["stats"] == VARIABLES["stats"]
    back = msbp.densify(sparse)
    assert jax.tree.structure(back) == jax.tree.structure(VARIABLES)
    dense = np.asarray(back["params"]["a"]["kernel"])
    least = np.sort(np.abs(np.asarray(W)).ravel())[-12]
    np.testing.assert_array_equal(dense, np.where(np.abs(W) >= least, W, 0))


def test_the_largest_of_all_weights():
    sparse = msbp.prune(VARIABLES, density=0.25, scope="global")
    both = [np.asarray(leaf["kernel"]) for leaf in msbp.densify(sparse)["params"].values()]
    kept = sum((w != 0).sum() for w in both)
    assert kept == round(0.25 * 84)
    whole = np.concatenate([np.abs(np.asarray(leaf["kernel"])).ravel() for leaf in VARIABLES["params"].values()])
    assert min(np.abs(w[w != 0]).min() for w in both) == np.sort(whole)[-kept]


def test_erdos_renyi_keeps_more_of_small_weights():
    params = {"params": {"large": {"kernel": jnp.ones((200, 300))}, "small": {"kernel": jnp.ones((20, 10))}}}
    sparse = msbp.prune(params, density=0.05, method="random", scope="erdos_renyi", key=KEY)
    share = {name: leaf["kernel"].density for name, leaf in sparse["sparsity"].items()}
    assert share["small"] / share["large"] == pytest.approx((30 / 200) / (500 / 60000), rel=0.02)
    assert sum(len(leaf["kernel"]) for leaf in sparse["params"].values()) == pytest.approx(0.05 * 60200, abs=2)
    full = msbp.prune(params, density=0.9, method="random", scope="erdos_renyi", key=KEY)
    assert full["sparsity"]["small"]["kernel"].density == 1
    assert sum(len(leaf["kernel"]) for leaf in full["params"].values()) == pytest.approx(0.9 * 60200, abs=2)


def test_random_entries_are_drawn_alike():
    kept = np.zeros((6, 10))
    for number in range(400):
        sparse = msbp.prune(
            VARIABLES, density=0.3, method="random", include=["a/kernel"], key=jax.random.fold_in(KEY, number)
        )
        kept += np.asarray(sparse["sparsity"]["a"]["kernel"].mask())
    assert abs(kept / 400 - 0.3).max() < 5 * (0.3 * 0.7 / 400) ** 0.5


@settings(max_examples=12)  # shapes, each of which is compiled for
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.05, 1),
    st.integers(0, 3),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_there_and_back(m, n, share, seed, dtype):
    mask = np.random.default_rng(seed).random((m, n)) < share
    w = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(m, n)), dtype)
    if not mask.any():
        with pytest.raises(ValueError, match="keeps nothing"):
            msbp.prune({"params": w}, masks=mask)
        return
    sparse = msbp.prune({"params": w}, masks=mask)
    if mask.all():
        assert sparse["sparsity"] == {}
        return
    pattern = sparse["sparsity"]["params"]
    check_pattern(pattern, "w")
    assert sparse["params"].dtype == dtype
    np.testing.assert_array_equal(pattern.mask(), mask)
    np.testing.assert_array_equal(msbp.densify(sparse)["params"].astype(jnp.float32), np.where(mask, w, 0))


def test_masks_of_jaxpruner():
    """Unsigned bytes of 0 and 1, None where a parameter has none."""
    masks = {"a": {"kernel": (np.abs(W) > 1).astype(np.uint8), "bias": None}, "b": None}
    sparse = msbp.prune(VARIABLES, masks=masks)
    assert list(sparse["sparsity"]) == ["a"]
    np.testing.assert_array_equal(msbp.densify(sparse)["params"]["a"]["kernel"], np.where(np.abs(W) > 1, W, 0))


def test_from_a_state_dict_of_pytorch():
    """Its weights are [out, in]: turned they are kernels."""
    state = {"fc.weight": np.asarray(W.T) * (np.asarray(W.T) > 0.5), "fc.bias": np.zeros(10)}
    variables = {"params": {"kernel": jnp.asarray(state["fc.weight"].T), "bias": jnp.asarray(state["fc.bias"])}}
    sparse = msbp.prune(variables, masks={"kernel": state["fc.weight"].T != 0})
    x = jnp.ones((3, 6))
    found = msbp.sparse_weights(nn.Dense(10)).apply(sparse, x)
    np.testing.assert_allclose(found, np.asarray(x) @ state["fc.weight"].T, rtol=1e-5, atol=1e-6)


def test_stacked_layers_with_biases():
    """Of what a pattern names, kernels alone are weights."""
    blocks = {"Dense_0": {"kernel": jnp.ones((3, 5, 7)), "bias": jnp.ones((3, 7))}, "norm": {"scale": jnp.ones((3, 7))}}
    sparse = msbp.prune({"params": {"blocks": blocks}}, density=0.2, stacked=["blocks/*"])
    assert sparse["params"]["blocks"]["Dense_0"]["kernel"].shape == (3, 7)
    assert sparse["params"]["blocks"]["Dense_0"]["bias"].shape == (3, 7)
    assert list(sparse["sparsity"]["blocks"]) == ["Dense_0"]


def test_stacked_layers_are_padded_to_one_length():
    w = jax.random.normal(KEY, (3, 5, 7))
    mask = np.abs(w) > 0.8
    sparse = msbp.prune({"params": {"blocks": {"kernel": w}}}, masks={"blocks": {"kernel": mask}}, stacked=["blocks/*"])
    pattern = sparse["sparsity"]["blocks"]["kernel"]
    assert sparse["params"]["blocks"]["kernel"].shape == (3, mask.sum((1, 2)).max())
    check_pattern(pattern, "blocks")
    np.testing.assert_array_equal(msbp.densify(sparse)["params"]["blocks"]["kernel"], np.where(mask, w, 0))


def test_whole_blocks_by_their_norms():
    w = jax.random.normal(KEY, (32, 48)).at[8:16, 16:24].mul(10)
    sparse = msbp.prune({"params": {"kernel": w}}, density=0.25, block=(8, 8))
    mask = np.asarray(sparse["sparsity"]["kernel"].mask())
    blocks = mask.reshape(4, 8, 6, 8).mean(axis=(1, 3))
    assert set(blocks.ravel().tolist()) == {0, 1}
    assert blocks.sum() == 6
    assert blocks[1, 2] == 1
    np.testing.assert_array_equal(msbp.densify(sparse)["params"]["kernel"], np.where(mask, w, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "one of density= and masks="),
        ({"density": 0.1, "masks": {}}, ValueError, "one of density= and masks="),
        ({"density": 0}, ValueError, r"density must lie in \(0, 1\]"),
        ({"density": "0.1"}, TypeError, "density must be a number"),
        ({"density": 0.001}, ValueError, "At density 0.001 nothing is kept of a/kernel, b/kernel"),
        ({"density": 0.02, "scope": "global"}, ValueError, "a/kernel: A mask keeps nothing of a weight"),
        ({"density": 0.1, "method": "l2"}, ValueError, 'method must be "magnitude" or "random"'),
        ({"density": 0.1, "scope": "all"}, ValueError, 'scope must be "layer", "global" or "erdos_renyi"'),
        ({"density": 0.1, "method": "random"}, ValueError, "needs a key"),
        ({"density": 0.1, "key": KEY}, ValueError, "takes no key"),
        ({"density": 0.1, "method": "random", "scope": "global", "key": KEY}, ValueError, "no order among layers"),
        ({"density": 0.1, "include": "*/kernel"}, TypeError, "include takes a list of patterns, got the string"),
        ({"density": 0.1, "input_axes": {"a/kernel": 0}}, ValueError, "1 or more, by pattern; got 0"),
        ({"masks": {"a": {"kernel": W > 0}}, "method": "random"}, ValueError, "Masks say all"),
        ({"masks": {"a": {"kernel": W > 0}}, "include": ["a/*"]}, ValueError, "Masks say all"),
        ({"masks": {"a": {"kernel": W > 0}}, "block": 4}, ValueError, r"block must be \(inputs, features\)"),
        ({"density": 0.1, "include": ["c/*"]}, ValueError, "include: 'c/\\*' matches none of the parameters"),
        ({"density": 0.1, "stacked": ["c/*"]}, ValueError, "stacked: 'c/\\*' matches none"),
        ({"density": 0.1, "input_axes": {"c/*": 1}}, ValueError, "input_axes: 'c/\\*' matches none"),
        ({"density": 0.1, "include": ["*/bias"]}, TypeError, "a/bias is no weight to prune"),
        ({"density": 0.1, "input_axes": {"a/kernel": 2}}, ValueError, "2 axes cannot be the inputs"),
        ({"density": 0.5, "block": (4, 4)}, ValueError, "a/kernel, 6 x 10, cannot be cut into blocks of 4 x 4"),
        ({"density": 0.5, "block": 4}, ValueError, r"block must be \(inputs, features\)"),
        ({"masks": {"a": {"kernel": W > 0}}, "block": (2, 2)}, ValueError, "does not consist of blocks of 2 x 2"),
        ({"masks": {"a": {"kernel": W > 0}}, "block": (4, 4)}, ValueError, "cannot be cut into blocks of 4 x 4"),
        ({"masks": {"c": np.ones(3, bool)}}, ValueError, "There is a mask of c"),
        ({"masks": {"a": {"kernel": np.ones((6, 9), bool)}}}, ValueError, r"has shape \(6, 9\), and the weight"),
        ({"masks": {"a": {"kernel": np.full((6, 10), 0.5)}}}, TypeError, "must be of booleans, or of 0 and 1"),
        ({"masks": {"a": {"kernel": np.zeros((6, 10), bool)}}}, ValueError, "a/kernel: A mask keeps nothing"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        msbp.prune(VARIABLES, **options)


def test_other_things_that_are_refused():
    with pytest.raises(ValueError, match='variables with a collection "params"'):
        msbp.prune(VARIABLES["params"], density=0.1)
    sparse = msbp.prune(VARIABLES, density=0.2)
    with pytest.raises(ValueError, match="are sparse already"):
        msbp.prune(sparse, density=0.1)
    with pytest.raises(ValueError, match="no weight to prune among bias"):
        msbp.prune({"params": {"bias": jnp.ones(3)}}, density=0.1)
    with pytest.raises(ValueError, match="a/kernel has entries that are not finite"):
        msbp.prune({"params": {"a": {"kernel": W.at[1, 2].set(jnp.nan)}}}, density=0.1)
    with pytest.raises(TypeError, match="decided outside of jit"):
        jax.jit(lambda v: msbp.prune(v, density=0.1)["params"])({"params": VARIABLES["params"]})
    shapes = jax.eval_shape(lambda: {"params": VARIABLES["params"]})
    with pytest.raises(TypeError, match="is a shape without numbers"):
        msbp.prune(shapes, density=0.1)
    with pytest.raises(TypeError, match="a shape without numbers: values"):
        msbp.prune(shapes, masks={"a": {"kernel": W > 0}})
    with pytest.raises(ValueError, match='densify takes variables with collections "params"'):
        msbp.densify({"a": W})
    for clash in ({"a/b": W, "a": {"b": W}}, {"a": W, "a/b": W}):
        with pytest.raises(ValueError, match="is of two parameters, or of one and of a group"):
            msbp.prune({"params": clash}, density=0.1, include=["*"])
    with pytest.raises(TypeError, match="is no weight to prune"):
        msbp.prune({"params": {"kernel": W.astype(jnp.complex64)}}, density=0.1)
    with pytest.raises(TypeError, match="A mask must be boolean"):
        pattern_of(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"up to 2\^31 entries"):
        pattern_of(np.broadcast_to(np.ones(1, bool), (2**16, 2**15)))
    with pytest.raises(ValueError, match="The sparsity of a is not a pattern"):
        msbp.densify({"params": {"a": W}, "sparsity": {"a": jnp.ones(3)}})
    with pytest.raises(ValueError, match="There are patterns of a/kernel, b/kernel, and parameters c"):
        msbp.densify({"params": {"c": W}, "sparsity": sparse["sparsity"]})
    broken = {**sparse["params"], "a": {**sparse["params"]["a"], "kernel": jnp.ones(11)}}
    with pytest.raises(ValueError, match=r"a/kernel has shape \(11,\), and its pattern is of \(12,\) entries"):
        msbp.densify({**sparse, "params": broken})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.replace(starts=p.starts.at[0].set(1)), "must grow from 0"),
        (lambda p: p.replace(starts=p.starts.at[2].set(99)), "must grow from 0"),
        (lambda p: p.replace(inputs=p.inputs.at[0].set(6)), r"inputs of its pattern must lie in \[0, 6\)"),
        (lambda p: p.replace(features=p.features.at[0].set(-1)), r"features of its pattern must lie in \[0, 10\)"),
        (lambda p: p.replace(inputs=p.inputs.at[1].set(p.inputs[0])), "must ascend, and none be there twice"),
        (lambda p: p.replace(order=p.order.at[0].set(p.order[1])), "other entries input by input"),
        (lambda p: p.replace(order=p.order.at[0].set(1000)), "other entries input by input"),
        (lambda p: p.replace(input_starts=p.input_starts.at[-1].add(-1)), "other entries input by input"),
    ],
)
def test_patterns_that_contradict_themselves(change, message):
    mask = np.ones((6, 10), bool)
    mask[0, 3:] = False
    sparse = msbp.prune({"params": {"a": W}}, masks={"a": mask})
    with pytest.raises(ValueError, match=message):
        msbp.densify({**sparse, "sparsity": {"a": change(sparse["sparsity"]["a"])}})
