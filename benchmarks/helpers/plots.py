"""A picture for each part that has one."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

from benchmarks.helpers.records import Part, Row


def write(folder: pathlib.Path, parts: Mapping[str, Part]) -> None:
    """Write `layers.png` and `steps.png`, of those parts that are there.

    Args:
      folder: Where.
      parts: By name.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    pictures: dict[str, Callable[[list[Row], pathlib.Path], None]] = {"layers": layers, "steps": steps}
    for name, draw in pictures.items():
        if name in parts:
            draw(parts[name]["rows"], folder / f"{name}.png")


def layers(rows: list[Row], file: pathlib.Path) -> None:
    """Draw how much faster a layer's backward is, over density, a panel for each shape."""
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["rows x in x out"] for row in rows))
    figure, axes = plt.subplots(1, max(1, len(shapes)), figsize=(4 * len(shapes), 3.4), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=False):
        for group in dict.fromkeys(row["r"] for row in rows):
            line = [row for row in rows if (row["rows x in x out"], row["r"]) == (shape, group)]
            x = [100 * row["density"] for row in line]
            (drawn,) = axis.plot(x, [row["dense/xla"] for row in line], ":", label=f"xla, r={group}")
            if all("dense/native" in row for row in line):  # where a compiler was
                y = [row["dense/native"] for row in line]
                axis.plot(x, y, "o-", color=drawn.get_color(), label=f"native, r={group}")
        axis.plot([1, 25], [100, 4], "k--", linewidth=0.7, label="1 / density")
        axis.axhline(1, color="grey", linewidth=0.7)
        axis.set(xscale="log", yscale="log", title=shape, xlabel="density, %")
    axes[0][0].set_ylabel("dense backward / sparse backward")
    if shapes:
        axes[0][-1].legend(fontsize=7)
    figure.suptitle("Backward of one layer (dotted: plain XLA)", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def steps(rows: list[Row], file: pathlib.Path) -> None:
    """Draw how much faster a step is, beside its bound, a group of bars for each network and optimizer."""
    from matplotlib import pyplot as plt

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
    figure.savefig(file, dpi=110)
    plt.close(figure)
