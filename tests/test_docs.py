"""Every command and snippet of the documentation runs, at a small size; one that cannot says why beside it.

A block is left out only by a comment `<!-- not run: reason -->` on the line before it; its commands then go as far as
what the reason is about: up to loading the model, or to the first measurement.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "samples").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```", re.S | re.M)
SMALL_CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 5,
}  # more steps than presets keep dense
SMALL_STREAM = {"num_chunks": 2, "height": 32, "width": 32}
# What makes a command small enough for a test, whatever the text says.
SMALL_OPTIONS = {
    "generate-video": ["--num-inference-steps", "2"],
    "generate-video --stream": ["--num-chunks", "2", "--height", "32", "--width", "32"],
    "dit-accel compare": ["--num-prompts", "1", "--rounds", "1"],
    "dit-accel calibrate": ["--num-prompts", "1", "--candidates", "composed:order=raster,block=16,density=0.2"],
    "dit-accel bench attention": ["--rounds", "1", "--heads", "1", "--methods", "radial"],
}
LARGE = {"wan2.1-t2v-1.3b-480p": "cpu-1k", "cpu-4k": "cpu-1k", "cpu-8k": "cpu-1k", "random_blocks": "radial"}


INLINE = re.compile(r"`((?:dit-accel|generate-video) [^`]+)`")
# Where a command that is not run stops: its checks are over, and the long part begins.
LONG_PARTS = [
    "dit_accel.models.load_pipeline",
    "dit_accel.bench.attention.measure",
    "dit_accel.bench.kernels.measure_kernels",
    "dit_accel.bench.step.build",
    "dit_accel.bench.suite.kernel_rows",
]


def blocks(page, *kinds, is_run=True):
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["kind"] in kinds and (match["reason"] is None) == is_run:
            yield match["body"]


def pages_with(*kinds):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if any(blocks(page, *kinds))]


def with_sizes(call, sizes):
    """`call` with these arguments instead of those that the text gives."""

    @functools.wraps(call)
    def small(self, *args, **kwargs):
        return call(self, *args, **{**kwargs, **sizes})

    return small


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where the paths of the documentation exist, and pipelines that make small clips whatever is asked."""
    from diffusers import WanPipeline

    from dit_accel.methods import registry
    from dit_accel.pipelines.streaming import StreamingWanPipeline

    registry.list_methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # a page may register a method of its own
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a ball"}\n')
    (tmp_path / "prompts.yaml").write_text("- {chunk: 1, prompt: a ball}\n- {chunk: 2, prompt: a star, mode: cut}\n")
    for pipeline, name, sizes in (
        (WanPipeline, "__call__", SMALL_CALL),
        (StreamingWanPipeline, "stream", SMALL_STREAM),
    ):
        monkeypatch.setattr(pipeline, name, with_sizes(getattr(pipeline, name), sizes))
    return tmp_path


@pytest.mark.parametrize("page", pages_with("python"))
def test_snippets_run(page, place):
    import dit_accel
    from dit_accel.head_table import HeadTable
    from dit_accel.samples.tiny_random import tiny_pipeline

    pipe = tiny_pipeline("wan2.1-t2v")
    layers, heads = len(pipe.transformer.blocks), pipe.transformer.config.num_attention_heads
    rows = [["all", "own"][:heads] * (heads // 2) or ["all"] * heads for _ in range(layers)]
    HeadTable.make({"modes": {"all": {"method": "dense"}, "own": {}}, "heads": rows}).save("table.yaml")
    layout = dit_accel.TokenLayout((3, 8, 8))
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 32)
    names = {"__name__": "__docs__", "dit_accel": dit_accel, "pipe": pipe, "HeadTable": HeadTable, "torch": torch}
    names |= {"layout": layout, "q": q, "k": k, "v": v}
    for number, body in enumerate(blocks(page, "python")):
        exec(compile(body, f"{page.name}, snippet {number + 1}", "exec", dont_inherit=True), names)


def commands(page, is_run=True):
    for body in blocks(page, "sh", "bash", is_run=is_run):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def without(words, option):
    """The command without this option and its value."""
    if option not in words:
        return words
    at = words.index(option)
    return words[:at] + words[at + 2 :]


def small(words):
    words = [LARGE.get(word, word) if words[:2] == ["dit-accel", "bench"] else word for word in words]
    if words == ["dit-accel", "compare"]:
        words = [*words, "tiny-wan/radial"]
    start = "generate-video --stream" if "--stream" in words else " ".join(words[:3])
    for name, options in SMALL_OPTIONS.items():
        if start == name or (start.startswith(f"{name} ") and "stream" not in start):
            for option, *values in (options[i : i + 2] for i in range(0, len(options), 2)):
                words = words if "--dry-run" in words else [*without(words, option), option, *values]
    return words


def run(words, monkeypatch):
    from dit_accel.cli import generate, main

    entry = {"generate-video": generate.main, "dit-accel": main.main}[words[0]]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        entry()
    return left.value.code


@pytest.mark.parametrize("page", pages_with("sh", "bash"))
def test_commands_run(page, place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", (place / "prompts.jsonl").open())
    first = ["generate-video", "--prompt", "a ball", "--output"]
    assert run(small([*first, "outputs/video.mp4"]), monkeypatch) == 0, capsys.readouterr().err
    (place / "run.json").write_text((place / "outputs" / "video.json").read_text())
    targets = set(re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "pip":
            assert words[1] == "install", words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert run(small(words), monkeypatch) == 0, (words, capsys.readouterr().err)


class ReachedLongPart(BaseException):
    """Raised where a command would begin to load or to measure; the commands let it through."""


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=" ".join(words)[:60]) for page in PAGES for words in commands(page, is_run=False)]
)
def test_commands_that_are_not_run_pass_all_checks(words, place, monkeypatch, capsys):
    def stop(model=None, *_, **__):
        assert not str(model).startswith("samples/"), "what runs on a small model is to be run here"
        raise ReachedLongPart

    for name in LONG_PARTS:
        monkeypatch.setattr(name, stop)
    for name in ("first.png", "longlive_base.pt", "lora.pt"):
        (place / name).write_bytes(
            (ROOT / "docs" / "images" / "attention-maps.png").read_bytes() if name.endswith("png") else b""
        )
    if words[0] in ("dit-accel", "generate-video"):
        try:
            assert run(words, monkeypatch) == 0, (words, capsys.readouterr().err)
        except ReachedLongPart:
            return
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in ("pip", "torchrun"), words  # torchrun: tests/parallel


def test_snippets_that_are_not_run_compile():
    for page in PAGES:
        for body in blocks(page, "python", is_run=False):
            compile(body, page.name, "exec", dont_inherit=True)


@pytest.mark.parametrize("page", [page for page in PAGES if INLINE.search(page.read_text(encoding="utf-8"))], ids=str)
def test_commands_within_sentences_exist(page):
    import typer

    from dit_accel.cli import generate, main

    for text in INLINE.findall(page.read_text(encoding="utf-8")):
        name, *words = text.split()
        command = typer.main.get_command(main.app if name == "dit-accel" else generate.app)
        while words and not words[0].startswith("-") and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page.name}: {text}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= known, f"{page.name}: {text}"


def test_every_block_is_of_a_kind_that_is_run():
    kinds = {match["kind"] for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert kinds <= {"python", "sh", "bash", "yaml", "json", "text"}


@pytest.mark.parametrize("page", pages_with("json"))
def test_json_is_json(page):
    for body in blocks(page, "json"):
        assert [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
