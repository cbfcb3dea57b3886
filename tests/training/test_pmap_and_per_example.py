"""One gradient for each device or example: what becomes of the memory, and what of privacy."""

import functools

import jax
import jax.numpy as jnp
import optax
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

W = jax.random.normal(jax.random.key(0), (8, 64)) / 3
X = jax.random.normal(jax.random.key(1), (32, 8))
TOP = msbp.top_k(k=6)
S = msbp.memorized(TOP, decay=0.8)


def product(w, x):
    return jnp.tanh(x @ w)


def loss_of(f):
    return lambda w, m, x: (f(w, x, memory=m) ** 2).mean()


def replicated(tree, count=8):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)


def test_pmap_with_the_mean_of_the_memory_is_one_device_with_the_whole_batch():
    f = msbp.sparse_vjp(product, S)
    tx = optax.sgd(0.1, momentum=0.9)

    def step(w, opt_state, memory, x, mean=lambda tree: tree):
        loss, grads, memory = msbp.value_and_grad(loss_of(f))(w, memory, x)
        loss, grads, memory = mean((loss, grads, memory))
        updates, opt_state = tx.update(grads, opt_state, w)
        return optax.apply_updates(w, updates), opt_state, memory, loss

    one = (W, tx.init(W), f.init_memory(W, X))
    many = replicated(one)
    over_devices = jax.pmap(functools.partial(step, mean=lambda tree: jax.lax.pmean(tree, "batch")), axis_name="batch")
    # A loss of 1/8 of the batch is 8 times as large a share of it: rows of the cotangent, and so the memory, scale
    # with it, and gradients that are averaged are then alike.
    for _ in range(3):
        *many, losses = over_devices(*many, X.reshape(8, 4, 8))
        *one, loss = jax.jit(step)(*one, X)
        assert_trees_close(losses.mean(), loss, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda leaf: (leaf == leaf[:1]).all(), many))


def test_pmap_of_local_memories_needs_no_mean():
    """`reduce="local"` of one block: every device keeps its own, and only gradients are averaged."""
    f = msbp.sparse_vjp(product, msbp.memorized(TOP, 0.8, reduce="local", shards=1))
    g = msbp.sparse_vjp(product, msbp.memorized(TOP, 0.8, reduce="local", shards=8))

    def step(w, memory, x):
        _, grads, memory = msbp.value_and_grad(loss_of(f))(w, memory, x)
        return jax.lax.pmean(grads, "batch"), memory

    many = replicated(f.init_memory(W, X[:4]))
    one = g.init_memory(W, X)
    over_devices = jax.pmap(step, axis_name="batch", in_axes=(None, 0, 0))
    for _ in range(3):
        grads, many = over_devices(W, many, X.reshape(8, 4, 8))
        _, want, one = msbp.value_and_grad(loss_of(g))(W, one, X)
        assert_trees_close(grads[0], want, rtol=1e-4)


def per_example(f):
    """Return gradients by example, and the new memories, as DP-SGD takes them."""
    step = msbp.value_and_grad(loss_of(f))
    return jax.jit(jax.vmap(lambda w, m, x: step(w, m, x[None])[1:], in_axes=(None, None, 0)))


def test_per_example_gradients_are_those_of_examples_alone():
    f = msbp.sparse_vjp(product, S)
    memory = f.init_memory(W, X[:1])
    warm = msbp.value_and_grad(loss_of(f))(W, memory, X)[2]
    grads, memories = per_example(f)(W, warm, X[:5])
    for i in range(5):
        _, want, alone = msbp.value_and_grad(loss_of(f))(W, warm, X[i : i + 1])
        assert_trees_close(grads[i], want)
        assert_trees_close(memories["params"].residual[i], alone["params"].residual)


def test_private_gradients_depend_on_the_memory_and_the_memory_on_examples():
    """Clipping bounds what one example does to this step; through an averaged memory it does more in the next.

    So DP-SGD has no guarantee with a memory that is averaged over examples, and has its own without memory.
    """
    step = per_example(msbp.sparse_vjp(product, S))
    memory = msbp.sparse_vjp(product, S).init_memory(W, X[:1])
    mean = lambda memories: jax.tree.map(lambda leaf: leaf.mean(axis=0), memories)
    _, memories = step(W, memory, X)
    _, others = step(W, memory, X.at[0].set(100.0))
    after, changed = (step(W, mean(m), X[1:])[0] for m in (memories, others))
    assert not jnp.allclose(after, changed)  # gradients of examples that are the same in both

    plain = msbp.sparse_vjp(product, TOP)
    grads = [per_example(plain)(W, plain.init_memory(W, X[:1]), x)[0] for x in (X, X.at[0].set(100.0))]
    assert_trees_equal(grads[0][1:], grads[1][1:])
    tx = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))
    updates, _ = tx.update(grads[0], tx.init(W))
    assert updates.shape == W.shape
