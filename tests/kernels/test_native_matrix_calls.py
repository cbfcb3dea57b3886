"""The handlers for cotangents that come as matrices (rows, entries), called with whatever comes."""

import hypothesis
import hypothesis.strategies as st
import pytest
from test_native import RANKS, native, runs_or_is_refused, spoil

from msbp_jax.kernels.native import calls

REAL = ("float32", "bfloat16")
# Axes of each operand and each result, and their dtypes; "w" is "m n" or "n m", "same" the dtype of the first operand.
MATRIX, FLAGS = ("rows n", REAL), ("features_last",)
CALLS = {
    "live_rows": ([MATRIX], [("rows", ("float32",))], ()),
    "row_moments": ([MATRIX], [("rows 3", ("float32",))], ()),
    "dither": (
        [MATRIX, ("rows", ("uint32",)), ("2", ("uint32",)), ("1", ("float32",))],
        [("rows n", "same"), ("rows", ("float32",))],
        ("prunes",),
    ),
    "rows_grad_input": ([MATRIX, ("rows", ("float32",)), ("w", REAL)], [("rows m", ("float32",))], FLAGS),
    "rows_grad_weight": ([MATRIX, ("rows", ("float32",)), ("rows m", REAL)], [("w", ("float32",))], FLAGS),
    "entries_grad_input": ([MATRIX, ("1", ("float32",)), ("w", REAL)], [("rows m", ("float32",))], FLAGS),
    "entries_grad_weight": ([MATRIX, ("1", ("float32",)), ("rows m", REAL)], [("w", ("float32",))], FLAGS),
}


def axes_of(axes, numbers):
    return (("m n" if numbers.get("features_last") else "n m") if axes == "w" else axes).split()


def fits(which, operands, results, numbers):
    """Whether a call is one that the kernels are written for, said a second time."""
    wanted, sizes, batches = [*CALLS[which][0], *CALLS[which][1]], {"1": 1, "2": 2, "3": 3}, []
    for (shape, dtype), (axes, dtypes) in zip([*operands, *results], wanted, strict=True):
        names = axes_of(axes, numbers)
        if len(shape) < len(names) or dtype not in ((operands[0][1],) if dtypes == "same" else dtypes):
            return False
        batches.append(shape[: len(shape) - len(names)])
        for name, size in zip(names, shape[len(shape) - len(names) :], strict=True):
            if size < 1 or sizes.setdefault(name, size) != size:
                return False
    whole = batches[len(operands)]
    along = all(
        len(batch) == len(whole) and all(size in (1, all_of) for size, all_of in zip(batch, whole, strict=True))
        for batch in batches
    )
    return along and 0 <= numbers["instruction_set"] < len(calls.instruction_sets())


def good_call(draw, which):
    """Draw a call that fits."""
    sizes = {name: draw(st.integers(1, 6)) for name in ("rows", "n", "m")} | {"1": 1, "2": 2, "3": 3}
    numbers = {name: draw(st.booleans()) for name in CALLS[which][2]}
    numbers["instruction_set"] = draw(st.integers(0, len(calls.instruction_sets()) - 1))
    batch, first = draw(st.sampled_from([(), (2,), (1, 3)])), draw(st.sampled_from(REAL))

    def array(number, axes, dtypes):
        dtype = first if dtypes == "same" or number == 0 else draw(st.sampled_from(dtypes))
        return (*batch, *(sizes[name] for name in axes_of(axes, numbers))), dtype

    operands, results = ([array(i, *spec) for i, spec in enumerate(side)] for side in CALLS[which][:2])
    if results and CALLS[which][1][0][1] != "same":
        results[0] = (results[0][0], CALLS[which][1][0][1][0])
    return operands, results, numbers


@native
def test_every_handler_is_in_a_table():
    elsewhere = {"weight_times", "weight_gradient", "unpack", "pack"}  # test_sparse_weight_calls
    elsewhere |= {"largest", "sparse_convolution", "sparse_convolution_gradient"}  # test_places, .._convolution_calls
    elsewhere |= {"images_grad_input", "images_grad_weight"}  # test_images
    assert {name.removeprefix("msbp_") for name in calls._extension().handlers()} == {*CALLS, *RANKS, *elsewhere}


@pytest.mark.slow
@native
@pytest.mark.parametrize("spoiled", ["nothing", "an operand", "a result", "a number"])
@pytest.mark.parametrize("which", CALLS)
def test_the_handlers_run_what_fits_and_refuse_all_else(which, spoiled):
    """Never a crash, and an error that says what must be."""
    fitted = []

    @hypothesis.settings(max_examples=25)
    @hypothesis.given(data=st.data())
    def check(data):
        draw = data.draw
        operands, results, numbers = good_call(draw, which)
        if spoiled == "an operand":
            operands = spoil(draw, operands, 0)
        if spoiled == "a result":
            results = spoil(draw, results, 1)  # XLA does not run what has no result
        if spoiled == "a number":
            numbers["instruction_set"] = draw(st.sampled_from([-1, 7, 2**40]))
        fitted.append(fits(which, operands, results, numbers))
        runs_or_is_refused(which, operands, results, numbers, fitted[-1])

    check()
    assert all(fitted) if spoiled == "nothing" else not all(fitted)
