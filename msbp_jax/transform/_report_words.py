"""The sentences of a report: what a step gains, what was measured, what is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msbp_jax.transform._measure import Measured
    from msbp_jax.transform._report import Report


WHILE_NOTHING = "while nothing is left out"


def headline(report: Report) -> str:
    """Say what a step is expected to gain, and where its time goes; on which side of 1 it is."""
    expected = report.expected
    if expected is None:
        return f"What a step gains is not estimated: {report.unexpected}."
    under = f" {report.density}" if report.density else ""
    backward, dense = sum(layer.sparse for layer in expected.layers), sum(layer.dense for layer in expected.layers)
    parts = [f"forward {ms(expected.forward)}", f"backward of the layers {ms(backward)} instead of {ms(dense)}"]
    parts += [f"the rest {ms(expected.rest)}"]
    parts += [f"optimizer {ms(expected.optimizer)}"] if expected.optimizer else []
    text = f"Expected{under}: {gain(expected.speed_up)} ({ms(expected.sparse)} ms instead of {ms(expected.plain)}; "
    text += f"{', '.join(parts)})"
    waits = report.density == WHILE_NOTHING
    advice = ": train this dense." if round(expected.speed_up, 2) < 1 and not waits else "."
    further = " At a density, it is told by share= or memory=." if waits else ""
    return f"{text}{advice}{further}{'' if expected.optimizer else ' No optimizer is counted: optimizer= does.'}"


def gain(speed_up: float) -> str:
    """Say by how much a step is faster, or slower."""
    if round(speed_up, 2) == 1:
        return "a step as fast as the dense one"
    return f"a step {_digits(speed_up)} times faster" if speed_up > 1 else f"a step {speed_up:.2g} times as fast"


def ratio(speed_up: float) -> str:
    """Return a speed-up for a table."""
    return f"{speed_up:.2f}x" if speed_up < 10 else f"{_digits(speed_up)}x"


def measured_words(measured: Measured | None) -> list[str]:
    """Say what was measured, and what follows."""
    if measured is None:
        return []
    waits = measured.at == WHILE_NOTHING  # then what follows depends on what will be left out
    under = f" {measured.at}" if measured.at else ""
    said = [
        f"Measured{under} on {measured.device}, medians of {measured.rounds}: {gain(measured.speed_up)} "
        f"({ms(measured.sparse)} ms instead of {ms(measured.plain)})."
    ]
    if measured.train_dense and not waits:
        said.append("Train this dense: nothing that was tried is faster than the dense step, beyond noise.")
    for group, took in () if measured.train_dense else measured.better_groups:
        others = ", ".join(f"{r}: {ms(seconds)}" for r, seconds in measured.groups if r != group)
        said.append(
            f"rows_per_group={group} is {_rank(measured, took)}: {ms(took)} ms, {_against_dense(measured.plain / took)}"
            + (f" ({others})." if others else ".")
        )
    if measured.leave_dense and not measured.train_dense and not waits:
        without = dict(measured.left_dense)
        each = ", ".join(f"{name} ({ms(without[name])} ms with it dense)" for name in measured.leave_dense)
        said.append(f"Leave dense: {each}.")
    if measured.not_tried:
        said.append(f"Not tried, for want of time: {', '.join(measured.not_tried)}.")
    return said


def _rank(measured: Measured, took: float) -> str:
    """Say whether a variant is the best of all, the dense step and single layers left dense among them."""
    best = took <= min([measured.plain, *(other for _, other in measured.left_dense)])
    return "best" if best else "better than as planned"


def _against_dense(speed_up: float) -> str:
    if round(speed_up, 2) == 1:
        return "as fast as dense"
    return f"{_digits(speed_up)} times faster than dense" if speed_up > 1 else f"{speed_up:.2g} times as fast as dense"


def saved_words(report: Report) -> str:
    """Say which share of the multiply-adds is saved."""
    text = f"Sparse backward: {report.saved:.1%} of all backward multiply-adds saved"
    return text + "".join(f", and the share of the {skipped} that are left out" for skipped in report.skipped)


def skipped_words(report: Report) -> list[str]:
    """Say what the saving depends on, where only the run tells."""
    return [
        f"By {skipped}: what is saved is the share of the {skipped} that are left out; while none is, looking for them "
        "costs a few percent of a step, most where layers are small."
        for skipped in report.skipped
    ]


def ms(seconds: float) -> str:
    """Return milliseconds in three digits."""
    return _digits(1e3 * seconds)


def _digits(value: float) -> str:
    """Return a number in three digits, or as many as stand before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
