"""Results as one JSON file, one Markdown file, and plots."""

from __future__ import annotations

import json
import pathlib
import platform
from typing import Any

import jax

import msbp_jax as msbp
from msbp_jax.kernels import _native_calls


def machine(torch_version: str) -> dict[str, Any]:
    """Return what the figures were measured with."""
    info = pathlib.Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": f"{len(models)} x {models[0]}" if models else platform.machine(),
        "instruction sets": list(_native_calls.instruction_sets()),
        "devices": str(jax.devices()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "msbp_jax": msbp.__version__,
        "torch": torch_version,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(h, "-")) for h in head) + " |" for row in rows])


def write(folder: pathlib.Path, result: dict[str, Any]) -> None:
    """Write results.json, results.md and the plots; parts measured before and not now are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= result
    file.write_text(json.dumps(known, indent=1) + "\n")
    parts = {name: part for name, part in known.items() if isinstance(part, dict) and "rows" in part}
    text = ["# Results", "", "Written by `python -m benchmarks`; README.md says what they mean.", ""]
    for name, part in parts.items():
        conditions = ", ".join(f"{key} {value}" for key, value in part["machine"].items())
        text += [f"## {name}", "", f"{part['date']}: {conditions}.", "", markdown(part["rows"]), ""]
    (folder / "results.md").write_text("\n".join(text))
    plot(folder, parts)


def plot(folder: pathlib.Path, parts: dict[str, Any]) -> None:
    """Write one picture a part that has one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if "layers" in parts:
        rows = [row for row in parts["layers"]["rows"] if "dense/native" in row]
        shapes = list(dict.fromkeys(row["rows x in x out"] for row in rows))
        figure, axes = plt.subplots(1, max(1, len(shapes)), figsize=(4 * len(shapes), 3.4), sharey=True, squeeze=False)
        for axis, shape in zip(axes[0], shapes, strict=False):
            for group in dict.fromkeys(row["r"] for row in rows):
                line = [row for row in rows if (row["rows x in x out"], row["r"]) == (shape, group)]
                x = [100 * row["density"] for row in line]
                (drawn,) = axis.plot(x, [row["dense/native"] for row in line], "o-", label=f"native, r={group}")
                axis.plot(x, [row["dense/xla"] for row in line], ":", color=drawn.get_color())
            axis.plot([1, 25], [100, 4], "k--", linewidth=0.7, label="1 / density")
            axis.axhline(1, color="grey", linewidth=0.7)
            axis.set(xscale="log", yscale="log", title=shape, xlabel="density, %")
        axes[0][0].set_ylabel("dense backward / sparse backward")
        axes[0][-1].legend(fontsize=7)
        figure.suptitle("Backward of one layer (dotted: plain XLA)", fontsize=10)
        figure.tight_layout()
        figure.savefig(folder / "layers.png", dpi=110)
        plt.close(figure)
    if "steps" in parts:
        rows = parts["steps"]["rows"]
        labels = [f"{row['network']}, {row['optimizer']}" for row in rows]
        figure, axis = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
        bars = {"bound": "bound", "dense/MSBP": "MSBP", "dense/MSBP r=1": "MSBP, r=1"}
        for offset, (key, label) in enumerate(bars.items()):
            places = [i + 0.27 * (offset - 1) for i in range(len(rows))]
            axis.barh(places, [row[key] for row in rows], 0.25, label=label)
        axis.axvline(1, color="grey", linewidth=0.7)
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("dense step / sparse step")
        axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / "steps.png", dpi=110)
        plt.close(figure)
