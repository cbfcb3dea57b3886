"""What a run writes as it goes: a file for each part, so that an interrupted run goes on where it stopped.

`NAME.json` is a part that is finished. `NAME.partial.json` has the rows so far of one that is not; it is measured again
from its beginning, as its rows would else come from two runs, and takes its name only with its last row. So what was
measured before is there until there is something newer.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

type Row = dict[str, Any]
type Part = dict[str, Any]  # part, date, machine, settings, rows, seconds


def today() -> str:
    """Return the date, as 2026-11-21."""
    return datetime.date.today().isoformat()


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """The parts in a folder.

    Attributes:
      folder: Where the files are.
      machine: What is measured on and with, see `machine.describe`.
      since: A part of this machine that was measured on this day or later is not measured again.
      again: Measure all the same.
    """

    folder: pathlib.Path
    machine: dict[str, Any]
    since: str = dataclasses.field(default_factory=today)
    again: bool = False

    def run(self, name: str, settings: dict[str, Any], measure: Callable[[], Iterable[Row]]) -> list[Row]:
        """Return the rows of a part, from its file or measured; each is written as it comes.

        Args:
          name: Of the part.
          settings: What it depends on beside the machine; another setting is measured again.
          measure: Gives the rows.
        """
        part: Part = {"part": name, "date": today(), "machine": self.machine, "settings": settings, "rows": []}
        known = self.read(name)
        if known is not None and not self.again and self._is_as_good(known, part):
            print(f"{name}: measured on {known['date']} (--again measures it again)", flush=True)
            return known["rows"]
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.file(name).with_suffix(".partial.json")
        partial.write_text(as_text(part))
        begun = time.perf_counter()
        for row in measure():
            part["rows"].append(row)
            partial.write_text(as_text(part))
            print(row, flush=True)
        partial.write_text(as_text(part | {"seconds": round(time.perf_counter() - begun)}))
        partial.replace(self.file(name))
        return part["rows"]

    def file(self, name: str) -> pathlib.Path:
        """Return the file of a part that is finished."""
        return self.folder / (re.sub(r"\W+", "_", name).strip("_") + ".json")

    def read(self, name: str) -> Part | None:
        """Return a part that is finished, or None."""
        file = self.file(name)
        return json.loads(file.read_text()) if file.is_file() else None

    def _is_as_good(self, known: Part, part: Part) -> bool:
        same = all(known.get(key) == json.loads(json.dumps(part[key])) for key in ("part", "machine", "settings"))
        return same and known["date"] >= self.since


def once(folder: pathlib.Path, label: str, make: Callable[[], Row]) -> Row:
    """Return a run from its file, or made now and written into it.

    Args:
      folder: Where files are.
      label: What tells runs apart.
      make: Makes it.
    """
    file = file_of(folder, label)
    if file.is_file():
        return json.loads(file.read_text())
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")
    return found


def label_of(settings: Row) -> str:
    """Return settings as the label of a run."""
    return " ".join(f"{key} {value}" for key, value in settings.items())


def file_of(folder: pathlib.Path, label: str) -> pathlib.Path:
    """Return where `once` keeps a run."""
    return folder / (re.sub(r"\W+", "_", label) + ".json")


def finished(folder: pathlib.Path) -> dict[str, Part]:
    """Return all parts in a folder that are finished, by name, whatever machine they are from."""
    files = sorted(file for file in folder.glob("*.json") if not file.name.endswith(".partial.json"))
    parts = [json.loads(file.read_text()) for file in files]
    return {part["part"]: part for part in parts}


def as_text(part: Part) -> str:
    """Return a part as JSON, a line for each row."""
    head = json.dumps({key: value for key, value in part.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in part["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
