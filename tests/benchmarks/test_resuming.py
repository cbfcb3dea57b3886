"""A run that was interrupted goes on where it stopped, and takes nothing for measured that is not."""

import datetime
import json

import pytest

from benchmarks import __main__ as command
from benchmarks.helpers import records
from benchmarks.helpers.records import Records, finished
from benchmarks.suite.context import Part

TODAY = datetime.date.today().isoformat()
YESTERDAY = (datetime.date.today() - datetime.timedelta(days=1)).isoformat()


class Measure:
    """Gives three rows and counts how often; stops before the last one if it is told to."""

    def __init__(self):
        self.runs, self.stops = 0, False

    def __call__(self, *_):
        self.runs += 1
        yield {"row": 1, "run": self.runs}
        yield {"row": 2, "run": self.runs}
        if self.stops:
            raise KeyboardInterrupt
        yield {"row": 3, "run": self.runs}


@pytest.fixture
def measure():
    return Measure()


def test_rows_are_written_as_they_come(tmp_path, measure):
    run = Records(tmp_path, {"jax": "1"})

    def watched():
        for number, row in enumerate(measure()):
            partial = json.loads((tmp_path / "a.partial.json").read_text())
            assert len(partial["rows"]) == number
            assert not (tmp_path / "a.json").exists()
            yield row

    assert [row["row"] for row in run.run("a", {}, watched)] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    part = json.loads((tmp_path / "a.json").read_text())
    assert (part["date"], part["machine"], len(part["rows"])) == (TODAY, {"jax": "1"}, 3)


def test_a_part_that_is_done_is_skipped(tmp_path, measure, capsys):
    rows = Records(tmp_path, {"jax": "1"}).run("a", {"rounds": 7}, measure)
    assert Records(tmp_path, {"jax": "1"}).run("a", {"rounds": 7}, measure) == rows
    assert measure.runs == 1
    assert f"a: measured on {TODAY} (--again measures it again)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "settings", "options"),
    [
        ({"jax": "2"}, {"rounds": 7}, {}),
        ({"jax": "1"}, {"rounds": 1}, {}),
        ({"jax": "1"}, {"rounds": 7}, {"again": True}),
        ({"jax": "1"}, {"rounds": 7}, {"since": "9999-01-01"}),
    ],
    ids=["another machine", "other settings", "again", "too old"],
)
def test_what_is_not_the_same_is_measured_again(tmp_path, measure, machine, settings, options):
    Records(tmp_path, {"jax": "1"}).run("a", {"rounds": 7}, measure)
    rows = Records(tmp_path, machine, **options).run("a", settings, measure)
    assert measure.runs == 2
    assert finished(tmp_path)["a"]["rows"] == rows == [{"row": row, "run": 2} for row in (1, 2, 3)]


def test_a_day_can_be_named_from_which_on_parts_count(tmp_path, measure, monkeypatch):
    """A run that goes past midnight, or on the next morning."""
    with monkeypatch.context() as before:
        before.setattr(records, "today", lambda: YESTERDAY)
        Records(tmp_path, {}, since=YESTERDAY).run("a", {}, measure)
    Records(tmp_path, {}, since=YESTERDAY).run("a", {}, measure)
    assert measure.runs == 1
    Records(tmp_path, {}).run("a", {}, measure)
    assert measure.runs == 2


def test_an_interrupted_part_is_measured_again_and_the_older_one_stays_until_then(tmp_path, measure):
    run = Records(tmp_path, {}, again=True)
    old = run.run("a", {}, measure)
    measure.stops = True
    with pytest.raises(KeyboardInterrupt):
        run.run("a", {}, measure)
    assert finished(tmp_path)["a"]["rows"] == old
    assert len(json.loads((tmp_path / "a.partial.json").read_text())["rows"]) == 2
    measure.stops = False
    new = run.run("a", {}, measure)
    assert new == finished(tmp_path)["a"]["rows"] == [{"row": row, "run": 3} for row in (1, 2, 3)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_names_become_files(tmp_path, measure):
    run = Records(tmp_path, {})
    run.run("steps (freed memory kept)", {}, measure)
    assert run.file("steps (freed memory kept)").name == "steps_freed_memory_kept.json"
    assert list(finished(tmp_path)) == ["steps (freed memory kept)"]
    assert run.read("steps") is None


def test_an_interrupted_suite_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    parts = {name: Measure() for name in ("one", "two", "three")}
    monkeypatch.setattr(command, "PARTS", {name: Part(name, 7, measure) for name, measure in parts.items()})
    arguments = ["--out", str(tmp_path)]
    parts["two"].stops = True
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["one"]
    parts["two"].stops = False
    command.main(arguments)
    assert [measure.runs for measure in parts.values()] == [1, 2, 1]
    result = json.loads((tmp_path / "results.json").read_text())
    assert {name: [row["run"] for row in part["rows"]] for name, part in result.items()} == {
        "one": [1, 1, 1],
        "two": [2, 2, 2],
        "three": [1, 1, 1],
    }
    command.main([*arguments, "two", "--again"])
    assert [measure.runs for measure in parts.values()] == [1, 3, 1]
    assert "## three" in (tmp_path / "results.md").read_text()
    command.main([*arguments, "one", "--suffix", " (elsewhere)"])
    assert "one (elsewhere)" in json.loads((tmp_path / "results.json").read_text())
    assert "| 3 | 2 |" in capsys.readouterr().out
