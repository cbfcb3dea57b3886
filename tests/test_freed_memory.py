"""Freed memory is kept: a block that is allocated again and again has its pages brought in once."""

import concurrent.futures
import ctypes
import multiprocessing
import resource
import sys

import pytest

import msbp_jax as msbp
from msbp_jax import _freed_memory

BLOCK = 48 << 20  # above what glibc takes from its heap by itself


def faults(kept):
    """Return page faults of writing into a large block for the third time, in this process, and what the call said."""
    done = _freed_memory.keep_freed_memory() if kept else None
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytes(BLOCK).translate(None)  # a block, and a copy of it
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found, done


def in_a_new_process(function, *args):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result(timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's behaviour")
def test_a_large_block_is_brought_in_once():
    pages = BLOCK // resource.getpagesize()
    assert in_a_new_process(faults, False)[0] > pages / 600  # huge pages are 512
    assert in_a_new_process(faults, True) == (pytest.approx(0, abs=50), True)


class Library:
    """A C library that knows some names, and says yes or no to settings."""

    def __init__(self, *names, answer=1):
        self.calls = []
        for name in names:
            setattr(self, name, lambda *args: self.calls.append(args) or answer)


@pytest.mark.parametrize(
    ("platform", "library", "done"),
    [
        ("darwin", Library("mallopt", "gnu_get_libc_version"), False),
        ("win32", None, False),
        ("linux", Library(), False),
        ("linux", Library("mallopt"), False),
        ("linux", Library("gnu_get_libc_version"), False),
        ("linux", Library("mallopt", "gnu_get_libc_version", answer=0), False),
        ("linux", Library("mallopt", "gnu_get_libc_version"), True),
    ],
)
def test_where_it_can_be_done(monkeypatch, platform, library, done):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert msbp.keep_freed_memory() is done
    if done:
        assert dict(library.calls) == {-4: 0, -1: -1, -8: 1}
