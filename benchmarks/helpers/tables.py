"""The parts of a run put together: one JSON file, and one Markdown file with a table for each."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks.helpers.records import Part, Row


def markdown(rows: list[Row]) -> str:
    """Return rows as a table."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(h, "-")) for h in head) + " |" for row in rows])


def as_json(parts: Mapping[str, Part]) -> str:
    """Return all parts as one JSON object, by name."""
    inner = {name: {key: value for key, value in part.items() if key != "part"} for name, part in parts.items()}
    return json.dumps(inner, indent=1) + "\n"


def as_markdown(parts: Mapping[str, Part], title: str, command: str) -> str:
    """Return a section for each part: when and with what it was measured, and its table.

    Args:
      parts: By name.
      title: The heading of it all.
      command: What writes it.
    """
    lines = [f"# {title}", "", f"Written by `{command}`; README.md says what they mean.", ""]
    for name, part in parts.items():
        conditions = ", ".join(f"{key} {value}" for key, value in _conditions(part).items())
        lines += [f"## {name}", "", f"{part['date']}: {conditions}.", "", markdown(part["rows"]), ""]
    return "\n".join(lines)


def write(folder: pathlib.Path, name: str, parts: Mapping[str, Part], title: str, command: str) -> None:
    """Write `NAME.json` and `NAME.md`.

    Args:
      folder: Where.
      name: Of the files.
      parts: By name, in the order of the sections.
      title: The heading of the Markdown file.
      command: What writes it.
    """
    (folder / f"{name}.json").write_text(as_json(parts))
    (folder / f"{name}.md").write_text(as_markdown(parts, title, command))


def _conditions(part: Part) -> dict[str, Any]:
    return part["machine"] | part.get("settings", {})
