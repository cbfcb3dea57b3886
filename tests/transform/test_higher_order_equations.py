"""Equations with a body keep every parameter when they are rebuilt; what a newer JAX adds is left dense, by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec as P
from test_constructs import twin_product
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax import _compat
from msbp_jax.rules import _dot_general, _operations
from msbp_jax.rules._operations import operation_of

K, N = 7, 64
S = msbp.memorized(msbp.top_k(k=K, rows_per_group=None), 0.5)


def data():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (N, N)) / 8, jax.random.normal(keys[1], (3, N, N)) / 8
    return weights, jax.random.normal(keys[2], (8, N))


def in_jit(dot, p, x):
    layer = jax.jit(lambda w, h, unused: dot(h, w), keep_unused=True, donate_argnums=1, compiler_options={})
    return layer(p[0], x * 2, x)


def in_scan(dot, p, x):
    return lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), h), x, p[1], reverse=True, unroll=2)[0]


def in_cond(dot, p, x):
    return lax.switch(x[0, 0].astype(int), [lambda x: x, lambda x: dot(x, p[0]), lambda x: dot(x, p[0]) * 2], x)


def by_platform(dot, p, x):
    return lax.platform_dependent(
        x,
        tpu=lambda x: dot(x, p[0]) * 3,
        cpu=lambda x: jnp.tanh(dot(x, p[0])),
        default=lambda x: dot(x, p[0]) * 2,
    )


def by_default(dot, p, x):
    return lax.platform_dependent(x, tpu=lambda x: dot(x, p[0]), default=lambda x: dot(x, p[0]) * 2)


def in_remat(dot, p, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(lambda x, w: jnp.tanh(dot(x, w)), prevent_cse=False, policy=policy)(x, p[0])


_CLOSED_CALL = _compat.closed_call_p


def in_closed_call(dot, p, x):
    body = jax.make_jaxpr(lambda x, w: dot(x, w))(x, p[0])
    return _CLOSED_CALL.bind(x, p[0], call_jaxpr=body)[0]


def in_shard_map(dot, p, x):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    body = lambda x, w: dot(x, w)
    options = {"mesh": mesh, "in_specs": (P("a"), P()), "out_specs": P("a"), "axis_names": {"a"}, "check_vma": True}
    return jax.jit(jax.shard_map(body, **options))(x, p[0])


PROGRAMS = {
    "jit": in_jit, "scan": in_scan, "cond": in_cond, "remat": in_remat, "closed_call": in_closed_call,
    "shard_map": in_shard_map,
}  # fmt: skip
BODIES = {"jaxpr", "branches", "call_jaxpr", "ft_in", "ft_out"}


def plain(a, w):
    return a @ w


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for body in _compat.jaxprs_in_params(eqn.params):
            yield from equations(getattr(body, "jaxpr", body))


def primitive(name):
    return {"jit": _compat.jit_p, "scan": _compat.scan_p, "cond": _compat.cond_p, "remat": _compat.remat_p}.get(name)


def first(name, function, *arguments):
    """Return the first equation of that name that has a contraction in it."""
    wanted = primitive(name).name if primitive(name) else name
    for eqn in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        inside = [e for body in _compat.jaxprs_in_params(eqn.params) for e in equations(getattr(body, "jaxpr", body))]
        named = eqn.params.get("name", "") != "mapped"  # our own
        if eqn.primitive.name == wanted and named and any("dot" in e.primitive.name for e in inside):
            return eqn
    raise AssertionError(f"no {wanted}")


@pytest.mark.parametrize("name", [*PROGRAMS, "platforms"])
def test_a_rebuilt_equation_keeps_every_parameter(name):
    params, x = data()
    program = PROGRAMS.get(name, by_platform)
    name = "cond" if name == "platforms" else name
    f = msbp.sparse_vjp(functools.partial(program, plain), S)
    memory = f.init_memory(params, x)
    assert memory
    if name == "closed_call":  # becomes its body, which is all there is to it
        assert_trees_equal(f(params, x, memory=memory), plain(x, params[0]))
        return
    before = first(name, lambda p, x: program(plain, p, x), params, x).params
    after = first(name, lambda p, x: f(p, x, memory=memory), params, x).params
    assert set(before) == set(after)
    for key in set(before) - BODIES:
        value, kept = before[key], after[key]
        if key in {"in_shardings", "in_layouts", "in_specs", "donated_invars"}:  # one for each argument: ours follow
            kept = kept[: len(value)]
        assert value == kept, key


@pytest.mark.slow
@pytest.mark.parametrize("program", [by_platform, by_default])
@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint], ids=["bare", "jit", "remat"])
def test_a_branch_for_each_platform(program, around):
    params, x = data()
    f = msbp.sparse_vjp(lambda p, x: around(functools.partial(program, plain))(p, x), S)
    memory = f.init_memory(params, x)
    assert list(memory) == ["0"]  # the branch that runs on this platform, and no other
    reasons = {site.name: site.reason for site in f.report(params, x).dense}
    others = [reason for reason in reasons.values() if "which is not run here" in reason]
    assert len(others) == (2 if program is by_platform else 1)
    assert any("in a branch for tpu" in reason for reason in others)
    step = lambda p, m, x: msbp.value_and_grad(lambda p, m: (f(p, x, memory=m) ** 2).mean())(p, m)
    twin = lambda p: (program(twin_product(None), p, x) ** 2).mean()
    for run in (step, jax.jit(step)):
        loss, grads, after = run(params, memory, x)
        assert_trees_close((loss, grads), jax.jit(jax.value_and_grad(twin))(params))
        assert np.abs(after["0"].residual).max() > 0


def reasons(f, params, x):
    report = f.report(params, x)
    assert not report.sparse
    return [site.reason for site in report.dense]


def is_plain(f, program, params, x):
    memory = f.init_memory(params, x)
    assert memory == {}
    got = jax.jit(msbp.value_and_grad(lambda p, m: (f(p, x, memory=m) ** 2).mean()))(params, memory)[:2]
    assert_trees_equal(got, jax.jit(jax.value_and_grad(lambda p: (program(plain, p, x) ** 2).mean()))(params))


@pytest.mark.filterwarnings("ignore:Nothing is sparse")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_parameter_that_we_do_not_know_leaves_it_dense(name, monkeypatch):
    params, x = data()
    key = primitive(name) or {"closed_call": _compat.closed_call_p}.get(name, "shard_map")
    needed, _ = _compat._programs._PARAMETERS[key]
    one = sorted(needed)[-1]
    monkeypatch.setitem(_compat._programs._PARAMETERS, key, (needed - {one}, set()))
    f = msbp.sparse_vjp(functools.partial(PROGRAMS[name], plain), S)
    assert any(f"whose parameter {one} this version of msbp_jax does not know" in r for r in reasons(f, params, x))
    is_plain(f, PROGRAMS[name], params, x)
    monkeypatch.setitem(_compat._programs._PARAMETERS, key, (needed | {"removed"}, set()))
    g = msbp.sparse_vjp(functools.partial(PROGRAMS[name], plain), S)
    assert any("which lacks the parameter removed in this version of JAX" in r for r in reasons(g, params, x))
    is_plain(g, PROGRAMS[name], params, x)


@pytest.mark.filterwarnings("ignore:Nothing is sparse")
@pytest.mark.parametrize("name", ["jit", "scan", "cond", "remat", "closed_call"])
def test_a_primitive_that_we_do_not_know_leaves_it_dense(name, monkeypatch):
    params, x = data()
    own = primitive(name) or _compat.closed_call_p
    monkeypatch.setattr(_compat, {"remat": "remat_p"}.get(name, f"{name}_p"), _compat.Primitive("jax_another"))
    f = msbp.sparse_vjp(functools.partial(PROGRAMS[name], plain), S)
    expected = f"inside {own.name}, a primitive that this version of msbp_jax does not look into"
    assert expected in reasons(f, params, x)
    is_plain(f, PROGRAMS[name], params, x)


@pytest.mark.filterwarnings("ignore:Nothing is sparse")
def test_a_primitive_of_somebody_else_is_named():
    """As `jax_remat3` would come: with a body, and no rule of ours."""
    remat3 = _compat.Primitive("jax_remat3")
    remat3.multiple_results = True
    remat3.def_impl(lambda *args, jaxpr: _compat.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args))
    remat3.def_abstract_eval(lambda *args, jaxpr: jaxpr.out_avals)
    params, x = data()

    def f(p, x):
        return remat3.bind(x, p[0], jaxpr=jax.make_jaxpr(lambda x, w: x @ w)(x, p[0]))[0]

    sparse = msbp.sparse_vjp(f, S)
    assert reasons(sparse, params, x) == [
        "inside jax_remat3, a primitive that this version of msbp_jax does not look into"
    ]
    assert_trees_equal(sparse(params, x, memory=sparse.init_memory(params, x)), f(params, x))


@pytest.mark.filterwarnings("ignore:Nothing is sparse")
def test_a_layout_and_a_differentiated_checkpoint_leave_it_dense():
    params, x = data()
    layout = jax.experimental.layout.Format(
        jax.experimental.layout.Layout((0, 1)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    held = msbp.sparse_vjp(lambda p, x: jax.jit(lambda x, w: x @ w, out_shardings=layout)(x, p[0]), S)
    assert reasons(held, params, x) == ["inside a jit that holds its arguments or results to layouts"]
    inner = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x) @ w).sum())
    derived = msbp.sparse_vjp(lambda p, x: jax.grad(inner)(x, p[0]), S).report(params, x)
    assert "inside a checkpoint that is differentiated already" in " ".join(site.reason for site in derived.dense)


def test_contractions_with_parameters_that_we_do_not_know():
    params = dict(jax.make_jaxpr(plain)(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns[0].params)
    assert isinstance(operation_of("dot_general", params, "rhs"), _dot_general.DotGeneral)
    with pytest.raises(NotImplementedError, match="its parameter swizzle is not known to this version of msbp_jax"):
        operation_of("dot_general", {**params, "swizzle": 1}, "rhs")
    params.pop("dimension_numbers")
    with pytest.raises(NotImplementedError, match="it lacks the parameter dimension_numbers in this version of JAX"):
        operation_of("dot_general", params, "rhs")


@pytest.mark.filterwarnings("ignore:Nothing is sparse")
def test_a_contraction_with_a_new_parameter_is_left_dense(monkeypatch):
    """An older msbp_jax knows fewer parameters of a product than JAX has: seen from there, one is new."""
    fields = _operations.dataclasses.fields
    monkeypatch.setattr(
        _operations.dataclasses, "fields", lambda of: tuple(f for f in fields(of) if f.name != "out_sharding")
    )
    params, x = data()
    f = msbp.sparse_vjp(lambda p, x: x @ p[0], S)
    assert reasons(f, params, x) == ["its parameter out_sharding is not known to this version of msbp_jax"]
    is_plain(f, lambda dot, p, x: dot(x, p[0]), params, x)


def in_a_scope(p, x):
    with jax.named_scope("my_scope"):
        return x @ p["w"]


def in_a_scope_and_jit(p, x):
    with jax.named_scope("my_scope"):
        return jax.jit(lambda w: x @ w)(p["w"])


def in_a_scope_and_scan(p, x):
    with jax.named_scope("my_scope"):
        return lax.scan(lambda h, w: (h @ w, None), x @ p["w"], p["s"])[0]


def with_metadata(p, x):
    with set_xla_metadata(my_scope="v"):
        return x @ p["w"]


@pytest.mark.parametrize("program", [in_a_scope, in_a_scope_and_jit, in_a_scope_and_scan, with_metadata])
def test_names_of_scopes_and_metadata_are_kept(program):
    """By which a profiler tells layers apart, in the forward and in the backward."""
    x, params = jnp.ones((6, 8)), {"w": jnp.ones((8, 64)), "s": jnp.ones((2, 64, 64))}
    f = msbp.sparse_vjp(program, msbp.memorized(msbp.top_k(k=6), 0.5))
    memory = f.init_memory(params, x)
    count = lambda function, *args: jax.jit(function).lower(*args).as_text(debug_info=True).count("my_scope")
    assert count(lambda p, m: f(p, x, memory=m), params, memory) >= count(lambda p: program(p, x), params) > 0
    step = msbp.value_and_grad(lambda p, m: f(p, x, memory=m).sum())
    assert count(step, params, memory) > count(lambda p, m: f(p, x, memory=m), params, memory)
