"""Prompts of a stream over time: from a file with chunk numbers, and from lines that are typed while it runs."""

from __future__ import annotations

import queue
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dit_accel.cli.app import errors
from dit_accel.errors import ConfigError
from dit_accel.methods.registry import config_error
from dit_accel.streaming import BLEND_CHUNKS

_LINE = re.compile(r"(?:(?P<mode>cut|recache|keep|blend)(?:\s+(?P<over>\d+))?\s*:)?\s*(?P<prompt>.*\S)\s*$")


class PromptChange(BaseModel):
    """A prompt that holds from a chunk on.

    Args:
        prompt: the text.
        chunk: number of the first chunk that has it, from 1.
        mode: "recache", "blend", "cut" or "keep"; see `VideoStream.set_prompt`.
        over: chunks of a blend, at least 2. Default 4; 1 for the other modes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    chunk: Annotated[int, Field(ge=1)] = 1
    mode: Literal["recache", "blend", "cut", "keep"] = "recache"
    over: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="before")
    @classmethod
    def _usual_length(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("over") is not None:
            return values
        return {**values, "over": BLEND_CHUNKS if values.get("mode") == "blend" else 1}

    @model_validator(mode="after")
    def _a_blend_alone_takes_time(self) -> PromptChange:
        if (self.over > 1) != (self.mode == "blend"):
            raise ValueError(f"over is for mode blend, of at least 2 chunks, got {self.over} with mode {self.mode}")
        return self


def read_prompts(path: Path) -> list[PromptChange]:
    """The changes of a YAML (or JSON) list of `{chunk, prompt, mode, over}`, by chunk.

    Raises:
        ConfigError: no such file, another structure, or two prompts for one chunk; the entry is named.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        changes = TypeAdapter(list[PromptChange]).validate_python(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("--prompts-file", f"cannot read {path}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise config_error(error, str(path), list(PromptChange.model_fields)) from None
    chunks = [change.chunk for change in changes]
    if len(set(chunks)) != len(chunks):
        raise ConfigError("--prompts-file", f"{path} has two prompts for one chunk")
    return sorted(changes, key=lambda change: change.chunk)


def parse_line(line: str) -> PromptChange | None:
    """A typed line, "a new prompt" or "mode: a new prompt" ("blend 4: ..."); None when there is nothing in it.

    Raises:
        ConfigError: a number of chunks that the mode does not take.
    """
    found = _LINE.match(line.strip())
    if found is None:
        return None
    over = None if found["over"] is None else int(found["over"])
    values = {"prompt": found["prompt"], "mode": found["mode"] or "recache", "over": over}
    try:
        return PromptChange.model_validate(values)
    except ValidationError as error:
        raise config_error(error, "typed prompt", list(PromptChange.model_fields)) from None


@dataclass(frozen=True)
class LiveState:
    """What has been typed since the last look: the latest change; and whether the input has ended."""

    change: PromptChange | None
    ended: bool


class LivePrompts:
    """Reads lines in a thread of its own, so that the stream never waits for the keyboard.

    Args:
        source: usually standard input.
    """

    def __init__(self, source: TextIO) -> None:
        self._source = source
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for line in self._source:
                self._lines.put(line)
        except UnicodeDecodeError as error:
            errors.print(f"no more prompts are read: {error}", markup=False)
        finally:  # or the stream would wait for the end of its input for ever
            self._lines.put(None)

    def look(self) -> LiveState:
        """Everything typed since the last call, of which the last prompt counts; what is wrong is told and left out."""
        change = None
        while True:
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return LiveState(change, self._ended)
            if line is None:
                self._ended = True
                continue
            try:
                change = parse_line(line) or change
            except ConfigError as error:
                errors.print(f"left out: {error}", markup=False)
