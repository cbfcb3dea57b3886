"""Peers that run in a process of their own, so that two thread pools never share the cores."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks.helpers.timing import Timed

# OpenMP's threads go on spinning for a while after a call; wait until they sleep.
_SETTLE_SECONDS = 0.02


class Torch:
    """PyTorch in another process; `reason` says why there is none, `missing` why another library is not with it.

    Args:
      python: Interpreter that has PyTorch; this one by default.
    """

    def __init__(self, python: str | None = None) -> None:
        self.reason, self.version = "", ""
        self.missing: dict[str, str] = {}
        worker = pathlib.Path(__file__).with_name("torch_worker.py")
        self._process = subprocess.Popen(
            [python or sys.executable, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        if hello:
            said = json.loads(hello)
            self.version, self.missing = said["version"], said["missing"]
            return
        errors = self._process.communicate()[1].strip().splitlines()
        self.reason = f"PyTorch did not start: {errors[-1] if errors else 'no output'}. Install msbp-jax[bench]."
        self.missing = {"sparseprop": "SparseProp runs with PyTorch."}

    def layer(self, name: str, **arguments: Any) -> Timed:
        """Return a timed call of a layer's backward; see `torch_worker.layer`."""
        return self._candidate(name, {"layer": arguments})

    def linear(self, name: str, **arguments: Any) -> Timed:
        """Return a timed call of a layer's forward and backward; see `torch_worker.linear`."""
        return self._candidate(name, {"linear": arguments})

    def step(self, name: str, **arguments: Any) -> Timed:
        """Return a timed call of a training step; see `torch_worker.step`."""
        return self._candidate(name, {"step": arguments})

    def forget(self) -> None:
        """Drop all candidates."""
        if not self.reason:
            self._ask({"forget": True})

    def close(self) -> None:
        """End the process."""
        if not self.reason:
            self._process.communicate()

    def _candidate(self, name: str, request: dict[str, Any]) -> Timed:
        self._ask({"name": name, **request})

        def call() -> float:
            seconds = self._ask({"time": name})["seconds"]
            time.sleep(_SETTLE_SECONDS)
            return seconds

        return call

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise RuntimeError("the worker has no input")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        return "" if self._process.stdout is None else self._process.stdout.readline()
