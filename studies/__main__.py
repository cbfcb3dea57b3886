"""Train networks and write down what they reach.

python -m studies NAME --help
python -m studies NAME --out FILE    # the file is written anew after each method
"""

from __future__ import annotations

import argparse
import json
import pathlib

from studies import accuracy, language_model, repeated_sites, rows, sparse_weights

# Each has `add_arguments(parser)`, and `run(args)`, which yields its result so far, again and again.
STUDIES = {
    "accuracy": accuracy,
    "language_model": language_model,
    "repeated_sites": repeated_sites,
    "rows": rows,
    "sparse_weights": sparse_weights,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one study.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m studies", description=__doc__, formatter_class=formatter)
    studies = parser.add_subparsers(metavar="NAME", required=True)
    for name, study in STUDIES.items():
        about = study.__doc__ or ""
        command = studies.add_parser(name, help=about.partition("\n")[0], description=about, formatter_class=formatter)
        command.add_argument("--out", type=pathlib.Path, help="JSON file to write")
        study.add_arguments(command)
        command.set_defaults(run=study.run)
    args = parser.parse_args(arguments)
    for result in args.run(args):
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
