"""Whole training steps beside plain JAX, PyTorch and the bound that Amdahl's law sets.

bound = dense step / (forward + optimizer + density x dense backward): what a backward whose time shrank with the
density would reach, everything in it counted as sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import Setting, large_transformer, loss_of, problem, settings, small, step_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed, training
from benchmarks.suite.context import Context

DENSITY, DECAY = 0.04, 0.8
OPTIMIZERS = (("SGD", optax.sgd(0.01)), ("Adam", optax.adam(1e-3)))


def networks(context: Context) -> list[Setting]:
    """Return the networks that are measured."""
    return [small()] if context.small else settings()


def methods(setting: Setting) -> dict[str, msbp.Sparsifier | None]:
    """Return plain JAX and the sparse methods that are measured."""
    top_k = msbp.top_k(density=DENSITY, rows_per_group=setting.rows_per_group)
    single = msbp.memorized(msbp.top_k(density=DENSITY), decay=DECAY)
    return {"dense": None, "top-k": top_k, "MSBP": msbp.memorized(top_k, decay=DECAY), "MSBP r=1": single}


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each network and optimizer, the ratios of a whole step."""
    torch = context.torch
    for setting in networks(context):
        for optimizer, tx in OPTIMIZERS[-1:] if context.small else OPTIMIZERS:
            calls: dict[str, Timed] = {}
            for method, sparsifier in methods(setting).items():
                gradients, params, memory = problem(setting, sparsifier)
                calls[method] = training(
                    step_of(tx, gradients), (params, memory, tx.init(params)), setting.x, setting.y
                )
            calls |= parts(setting, tx)
            if setting.mlp and not torch.reason:
                width, depth, batch = setting.mlp
                what = {"width": width, "depth": depth, "batch": batch, "density": DENSITY, "optimizer": optimizer}
                for method in ("dense", "meProp unified", "meProp simple"):
                    calls[f"torch {method}"] = torch.step(method, method=method, **what)
            ms = medians(calls, context.rounds)
            torch.forget()
            backward = max(0.0, ms["gradients"] - ms["forward"])
            bound = ms["dense"] / (ms["forward"] + ms["optimizer"] + DENSITY * backward)
            row: Row = {"network": setting.name, "optimizer": optimizer, "r": setting.rows_per_group}
            row |= {f"{name}_ms": round(ms[name], 2) for name in ("dense", "MSBP")}
            row["dense/MSBP"] = round(ms["dense"] / ms["MSBP"], 2)
            row["bound"] = round(bound, 2)
            row["share of bound"] = round(ms["dense"] / ms["MSBP"] / bound, 2)
            row["dense/top-k"] = round(ms["dense"] / ms["top-k"], 2)
            row["MSBP/top-k"] = round(ms["MSBP"] / ms["top-k"], 3)
            row["dense/MSBP r=1"] = round(ms["dense"] / ms["MSBP r=1"], 2)
            for name in ("dense", "meProp unified", "meProp simple"):
                row[f"torch {name}/MSBP"] = round(ms[f"torch {name}"] / ms["MSBP"], 2) if f"torch {name}" in ms else "-"
            yield row


def measure_transformer(context: Context) -> Iterator[Row]:
    """Yield the ratios of a step of a transformer at density 0.1, and the same with the attention left dense."""
    setting, tx = small() if context.small else large_transformer(), optax.adam(1e-3)
    top_k = msbp.top_k(density=0.1, rows_per_group=setting.rows_per_group)
    memorized = msbp.memorized(top_k, decay=DECAY)
    plans: dict[str, Any] = {"dense": None, "top-k": top_k, "MSBP": memorized, "MSBP, MLP only": {"Dense_*": memorized}}
    calls: dict[str, Timed] = {}
    for method, plan in plans.items():
        gradients, params, memory = problem(setting, plan)
        calls[method] = training(step_of(tx, gradients), (params, memory, tx.init(params)), setting.x, setting.y)
    calls |= parts(setting, tx)
    ms = medians(calls, context.rounds, warm_up=1)
    row: Row = {"network": setting.name, "optimizer": "Adam", "r": setting.rows_per_group}
    row |= {f"{name}_ms": round(ms[name], 1) for name in ("forward", "gradients", "dense", "MSBP")}
    row |= {f"dense/{name}": round(ms["dense"] / ms[name], 2) for name in ("top-k", "MSBP", "MSBP, MLP only")}
    backward = max(0.0, ms["gradients"] - ms["forward"])
    row["bound"] = round(ms["dense"] / (ms["forward"] + ms["optimizer"] + 0.1 * backward), 2)
    yield row


def parts(setting: Setting, tx: optax.GradientTransformation) -> dict[str, Timed]:
    """Return the parts of the dense step: forward, loss and gradients, optimizer."""
    gradients, params, _ = problem(setting, None)

    def forward(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss_of(setting.module.apply({"params": params}, x), y)

    def apply(state: tuple[Any, Any], grads: Any) -> tuple[tuple[Any, Any], jax.Array]:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), jax.numpy.zeros(())

    grads = jax.tree.map(jax.numpy.ones_like, params)
    return {
        "forward": timed(jax.jit(forward), params, setting.x, setting.y),
        "gradients": timed(jax.jit(lambda p, x, y: gradients(p, {}, x, y)), params, setting.x, setting.y),
        "optimizer": training(apply, (params, tx.init(params)), grads),
    }
