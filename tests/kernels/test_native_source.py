"""The C++ itself: fuzzed under sanitizers, compiled without anything that only x86 has, and what Python says of it."""

import itertools
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from msbp_jax.kernels.choice import cpu

NATIVE = pathlib.Path(__file__).parents[2] / "native"
SOURCES = [str(NATIVE / name) for name in ("fuzz.cpp", "scratch.cpp", "kernels.cpp")]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-pthread"]


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_fuzzed_under_sanitizers(tmp_path):
    program = str(tmp_path / "fuzz")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    if subprocess.run([COMPILER, *sanitize, str(probe), "-o", program], check=False, capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no sanitizers here")
    # Without optimization, which takes a minute to compile.
    run(COMPILER, *FLAGS, "-O0", "-g", *sanitize, *SOURCES, "-o", program)
    assert "0 failures" in run(program, "40")


@pytest.mark.slow
def test_compiles_for_another_processor(tmp_path):
    cross = shutil.which("aarch64-linux-gnu-g++")
    if cross is None:
        pytest.skip("no compiler for aarch64 (Debian: g++-aarch64-linux-gnu)")
    program = str(tmp_path / "fuzz")
    run(cross, *FLAGS, "-O2", "-static", *SOURCES, "-o", program)
    emulator = shutil.which("qemu-aarch64")
    if emulator:
        assert "0 failures" in run(emulator, program, "30")


def test_intrinsics_are_fenced():
    """What only x86 has stands between #ifdef __AVX2__ and #endif."""
    seen = 0
    for file in [*NATIVE.glob("*.h"), *NATIVE.glob("*.cpp")]:
        depth = 0
        for line in file.read_text().splitlines():
            seen += "_mm" in line
            if line.startswith(("#ifdef __AVX2__", "#ifdef MSBP_X86")):
                depth += 1
            elif line.startswith("#endif"):
                depth = max(0, depth - 1)
            assert depth or "_mm" not in line, f"{file.name}: {line}"
    assert seen


def test_both_sides_know_where_lists_end_and_groups_begin():
    """The kernels choose between their two paths in C++; the cost model in Python says which of them it has timed."""
    source = (NATIVE / "kernels.cpp").read_text()
    (condition,) = re.findall(r"bool by_lists\(const msbp::Product& p\) \{ return (.*?); \}", source)
    # Nothing but comparisons of r and k, so that it means in Python what it means in C++.
    assert re.fullmatch(r"(p\.[rk]|\d+|<=?|>=?|&&|\|\||[() ])+", condition)
    compiled = compile(condition.replace("p.", "").replace("&&", "and").replace("||", "or"), "kernels.cpp", "eval")
    grid = list(itertools.product(range(1, 40), range(1, 130)))
    in_cpp = {(r, k): eval(compiled, {"r": r, "k": k}) for r, k in grid}
    assert in_cpp == {(r, k): cpu.kind_of("native", k, r) == "native, lists" for r, k in grid}
    assert 0 < sum(in_cpp.values()) < len(grid)
    for product in ("grad_input", "grad_weight"):  # and both products ask it
        assert f"by_lists(p) ? {product}_by_lists<Value, Other>(p, pool) : {product}_by_groups<" in source
