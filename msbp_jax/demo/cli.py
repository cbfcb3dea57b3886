"""The demo's command line."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from msbp_jax.demo import data as datasets
from msbp_jax.demo.settings import OPTIMIZERS, Settings

DESCRIPTION = """\
Train one network four ways and compare them.

  dense   plain JAX: the backward of every layer is two dense products.
  rows    of each batch, only the examples are propagated whose gradient matters, drawn anew
          at every step and weighed up so that nothing is lost on the average: as few as are
          worth 95 % of the batch. The backward gets cheaper as the task is learned.
  top-k   of the gradient of each layer's output, only the k largest features are propagated
          (meProp). The backward gets cheaper; what is dropped is lost.
  MSBP    the same, but what is dropped is remembered and added to the next step's gradient
          (memorized sparse backpropagation). It costs about as little and loses less.

All four start from the same parameters and see the same batches.
"""

EPILOG = """\
examples:
  python -m msbp_jax.demo                                 digits, two layers of 1024, groups of 32 rows
  python -m msbp_jax.demo --rows-per-group 1 --k 20       the papers' setting: each example chooses for itself
  python -m msbp_jax.demo --rows-per-group None           one choice for the whole batch: fastest, coarsest
  python -m msbp_jax.demo --data FOLDER --width 500 --batch 50 --epochs 5     MNIST
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser; its help teaches."""
    p = argparse.ArgumentParser(
        prog="python -m msbp_jax.demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data = p.add_argument_group("data")
    data.add_argument(
        "--data", metavar="FOLDER", type=pathlib.Path,
        help="folder with MNIST's four IDX files, gzipped or not; without it, scikit-learn's bundled digits",
    )  # fmt: skip
    net = p.add_argument_group(
        "network", "Wide layers gain most: a sparse backward saves products, not their overhead."
    )
    net.add_argument("--width", type=int, default=1024, help="features of each hidden layer (default 1024)")
    net.add_argument("--depth", type=int, default=2, help="number of hidden layers (default 2)")
    sparse = p.add_argument_group("sparsity")
    sparse.add_argument(
        "--efficiency", type=float, default=0.95,
        help="what the sampled rows are to be worth, as a share of the batch (default 0.95)",
    )  # fmt: skip
    sparse.add_argument("--density", type=float, help="share of the features that is propagated (default 0.04)")
    sparse.add_argument("--k", type=int, help="number of features that is propagated, instead of a share")
    sparse.add_argument(
        "--rows-per-group", default="32", metavar="R",
        help="rows that share a choice: 1 follows each example, larger groups are faster, None is the whole batch "
        "(default 32)",
    )  # fmt: skip
    sparse.add_argument(
        "--decay", type=float, default=0.8,
        help="share of the remembered gradient that is carried on to the next step; 0 is plain top-k (default 0.8)",
    )  # fmt: skip
    train = p.add_argument_group("training")
    train.add_argument("--batch", type=int, default=128, help="examples of a step (default 128)")
    train.add_argument("--epochs", type=int, default=40, help="passes over the training set (default 40)")
    train.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="(default adam)")
    train.add_argument("--seed", type=int, default=0, help="of the parameters and the order of examples (default 0)")
    out = p.add_argument_group("output")
    out.add_argument("--plot", default="msbp-demo.png", metavar="FILE", help="picture to write (default msbp-demo.png)")
    out.add_argument("--no-plot", action="store_true", help="write no picture")
    out.add_argument("--json", metavar="FILE", help="write the numbers, too")
    return p


def settings_of(p: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """Return checked settings, or leave with status 2 and one line that says what to do.

    Args:
      p: The parser.
      arguments: Words of the command line; None for the process's own.
    """
    args = p.parse_args(arguments)
    for name in ("width", "depth", "batch", "epochs"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.density is not None and args.k is not None:
        p.error(f"--density and --k exclude each other, got {args.density} and {args.k}: give one of them")
    settings = Settings(
        data=args.data,
        width=args.width,
        depth=args.depth,
        batch=args.batch,
        epochs=args.epochs,
        efficiency=args.efficiency,
        density=0.04 if args.density is None and args.k is None else args.density,
        k=args.k,
        rows_per_group=_group(p, args.rows_per_group),
        decay=args.decay,
        optimizer=args.optimizer,
        seed=args.seed,
        plot=None if args.no_plot else _output(p, "--plot", args.plot),
        json=None if args.json is None else _output(p, "--json", args.json),
    )
    try:
        settings.methods()  # efficiency, k, density, rows_per_group and decay are checked by the library itself
    except (TypeError, ValueError) as error:
        p.error(str(error))
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
      arguments: Words of the command line; None for the process's own.

    Returns:
      The exit status, 0.
    """
    p = parser()
    settings = settings_of(p, arguments)
    needed = ["tqdm", *(["matplotlib"] if settings.plot else []), *(["sklearn"] if settings.data is None else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        p.error(f"the demo needs {', '.join(missing)}: pip install 'msbp-jax[examples]'")
    try:
        data = datasets.load(settings.data)
    except (FileNotFoundError, ValueError) as error:
        p.error(str(error))
    if settings.batch > len(data.train_y):
        p.error(f"--batch must be at most the {len(data.train_y)} training examples there are, got {settings.batch}")

    from msbp_jax import keep_freed_memory
    from msbp_jax.demo import report, run  # JAX starts up only once the arguments are good

    keep_freed_memory()  # before anything runs, for all methods alike
    results: dict[str, Any] = run.run(settings, data)
    report.show(settings, data, results)
    return 0


def _group(p: argparse.ArgumentParser, text: str) -> int | None:
    if text == "None":
        return None
    try:
        return int(text)
    except ValueError:
        p.error(f"--rows-per-group must be a number of rows or None, got {text!r}")


def _output(p: argparse.ArgumentParser, flag: str, text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if not text or path.is_dir() or not path.parent.is_dir():
        p.error(f"{flag} must name a file in a folder that exists, got {text!r}")
    return path
