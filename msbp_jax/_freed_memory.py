"""Page faults of a training step on a CPU, and how a process is rid of them."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>; their numbers are part of glibc's binary interface.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, so that a step on a CPU finds its temporaries in place.

    XLA allocates a step's temporaries afresh at every call. Blocks above 32 MiB glibc maps from the system and unmaps
    when they are freed, so that each step has to have every page of them brought in and set to 0 again: about a tenth
    of the time of a step that is 2048 wide, dense or sparse. After this call large blocks come from the heap, which
    stays as large as it has once been; and all threads share it, as a heap of a thread's own has no room for blocks
    above 64 MiB.

    It costs memory: what the process has once used it keeps to its end, be it free for its own use. Threads that
    allocate at the same time wait for each other, which a step does not notice. It is a setting of the whole process,
    for other libraries in it too, and cannot be taken back; so nothing in msbp_jax calls it for you. Call it first,
    before JAX has run anything: threads that have heaps already keep these, and map their largest blocks as before.

    Returns:
      Whether it was done. False on other systems than Linux and with other C libraries than glibc, where nothing is
      changed; and where glibc took some of the settings only. Another allocator in front of glibc's
      (`LD_PRELOAD`) does not hear of it, which cannot be told from here.

    Example:
      >>> import msbp_jax as msbp
      >>> kept = msbp.keep_freed_memory()  # the first line of a program that trains on a CPU
      >>> kept in (True, False)
      True
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    # Not M_MMAP_THRESHOLD, of which older glibcs refuse more than the 32 MiB that are the trouble. -1 is never.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    taken = [library.mallopt(name, value) == 1 for name, value in settings.items()]
    return all(taken)
