"""Batches: bad lines do not stop the rest, a kill loses nothing and repeats nothing."""

from __future__ import annotations

import json

import pytest

from dit_accel.batch import MANIFEST, BadLine, Item, Manifest, plan_batch, read_prompts, run_batch
from dit_accel.errors import ConfigError

OVERRIDES = ("height", "density")


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_become_items_and_bad_lines_say_why(tmp_path):
    file = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "a ball", "seed": 4, "height": 96},
        "",
        "{not json",
        ["a list"],
        {"prompt": "x", "sed": 1},
        {"prompt": "x", "seed": True},
        {"prompt": "x", "seed": 2**64},
        {"prompt": "  "},
        {"prompt": "x", "preset": 3},
    )
    items = read_prompts(file, OVERRIDES)
    assert items[0] == Item(1, "a ball", 4, overrides={"height": 96})
    assert all(isinstance(item, BadLine) for item in items[1:])
    assert [item.number for item in items] == [1, 3, 4, 5, 6, 7, 8, 9]
    reasons = [item.reason for item in items[1:]]
    assert "not JSON" in reasons[0]
    assert "did you mean 'seed'" in reasons[2]
    assert "got True" in reasons[3]


def test_lines_without_a_seed_take_that_of_the_run(tmp_path):
    file = write(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b", "seed": 0})
    assert [item.seed for item in read_prompts(file, OVERRIDES, seed=9)] == [9, 0]
    assert [item.seed for item in read_prompts(file, OVERRIDES)] == [0, 0]


def test_a_line_ends_where_its_json_does(tmp_path):
    """JSON may hold what Python's splitlines() takes for the end of a line, and Windows puts a mark at the front."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\u2028two"}\r\n{"prompt": "three"}\n', encoding="utf-8-sig", newline="")
    assert [(item.number, item.prompt) for item in read_prompts(file, ())] == [(1, "one\u2028two"), (2, "three")]


def test_a_file_that_cannot_be_read_or_is_empty(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "missing", OVERRIDES)
    with pytest.raises(ConfigError, match="holds no line"):
        read_prompts(write(tmp_path / "empty", "", ""), OVERRIDES)


def run(items, manifest, make, tell, options=""):
    """A batch whose results depend on line and options, and that refuses the prompt "bad"."""

    def plan(item):
        if item.prompt == "bad":
            raise ConfigError("preset", "no such preset")
        return item.file_name(".mp4"), f"{item.prompt} {item.seed} {options}"

    return run_batch(plan_batch(items, manifest, plan, tell), manifest, make, tell)


def test_a_failing_item_does_not_stop_the_rest_and_resume_runs_only_what_is_missing(tmp_path):
    items = [Item(1, "a"), BadLine(2, "not JSON"), Item(3, "b", seed=7), Item(4, "c")]
    made, told = [], []

    def make(item, path):
        made.append(item.number)
        if item.number == 3 and len(made) < 4:
            raise RuntimeError("out of\nmemory")
        path.write_text("film")

    folder = tmp_path / "out"
    assert run(items, Manifest(folder, resume=False), make, told.append) == 2
    assert told == ["line 2: not JSON", "line 1: 00001-seed0.mp4", "line 3: out of memory", "line 4: 00004-seed0.mp4"]
    assert [entry["status"] for entry in read(folder / MANIFEST)] == ["done", "failed", "done"]
    with pytest.raises(ConfigError, match="--resume"):
        Manifest(folder, resume=False)
    (folder / "00004-seed0.mp4").unlink()
    assert run(items, Manifest(folder, resume=True), make, told.append) == 3
    assert made == [1, 3, 4, 3, 4]


def test_every_line_is_checked_before_the_first_is_made(tmp_path):
    told = []

    def make(item, path):
        assert told == ["line 2: preset: no such preset", "line 3: not JSON"]
        path.write_text("film")

    assert (
        run([Item(1, "a"), Item(2, "bad"), BadLine(3, "not JSON")], Manifest(tmp_path, False), make, told.append) == 1
    )
    assert [(entry["line"], entry["status"]) for entry in read(tmp_path / MANIFEST)] == [(2, "failed"), (1, "done")]


def test_a_killed_run_continues_after_its_last_whole_line(tmp_path):
    items = [Item(n, "a") for n in (1, 2, 3)]
    made = []

    def make(item, path):
        made.append(item.number)
        path.write_text("film")
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(items, Manifest(tmp_path, resume=True), make, print)
    with (tmp_path / MANIFEST).open("a") as file:
        file.write('{"key": "2:cut sho')
    assert run(items, Manifest(tmp_path, resume=True), make, print) == 3
    assert made == [1, 2, 2, 3]
    assert run(items, Manifest(tmp_path, resume=True), make, print) == 3
    assert made == [1, 2, 2, 3]


def test_a_changed_line_runs_again_and_so_does_one_that_is_changed_back(tmp_path):
    made = []

    def make(item, path):
        made.append(item.prompt)
        path.write_text("film")

    for prompt in "abba":
        run([Item(1, prompt)], Manifest(tmp_path, resume=True), make, print)
    assert made == ["a", "b", "a"]


def test_other_options_make_a_line_again_and_say_so(tmp_path):
    made, told = [], []

    def make(item, path):
        made.append(item.number)
        path.write_text("film")

    for options in ("--model tiny", "", ""):
        run([Item(1, "a")], Manifest(tmp_path, resume=True), make, told.append, options)
    assert made == [1, 1]
    assert "00001-seed0.mp4 is there, made with other values, options or files" in told[1]
    assert told[2:] == ["line 1: 00001-seed0.mp4"]


def test_the_manifest_of_an_earlier_version_vouches_for_nothing(tmp_path):
    (tmp_path / "00001-seed0.mp4").write_text("old")
    entry = {"key": "1:0123456789abcdef", "line": 1, "status": "done", "output": "00001-seed0.mp4"}
    (tmp_path / MANIFEST).write_text(json.dumps(entry) + "\n")
    told = []
    assert run([Item(1, "a")], Manifest(tmp_path, True), lambda item, path: path.write_text("new"), told.append) == 1
    assert "it is made again" in told[0]
    assert (tmp_path / "00001-seed0.mp4").read_text() == "new"


def test_a_prompt_never_becomes_a_file_name():
    assert Item(3, "../../etc/passwd", 5).file_name(".mp4") == "00003-seed5.mp4"
