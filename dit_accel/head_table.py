"""Per-head tables: which method, with which parameters, each head of each layer runs under."""

from __future__ import annotations

import json
import os
import string
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dit_accel.errors import ConfigError, near_matches
from dit_accel.methods.base import Method
from dit_accel.methods.registry import config_error, get_method, with_parameters

FORMAT = "dit_accel.head_table/1"
SKIP = "skip"

_Rows = Annotated[
    tuple[tuple[str, ...], ...],
    BeforeValidator(lambda rows: tuple(tuple(r) for r in rows) if isinstance(rows, (list, tuple)) else rows),
]


class HeadMode(BaseModel):
    """One entry of a table's palette.

    Args:
        method: a registered method; "skip": the head is not computed and its output is zero; None: the method that the
            table is used with.
        parameters: parameters of that method; with None, those that replace its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    def resolve(self, base: Method, path: str = "head_table.modes") -> Method | None:
        """The method of this entry, None for a skipped head.

        Args:
            base: the method that entries without a name change.
            path: where the entry stands, for errors.

        Raises:
            ConfigError: unknown method or parameter, or parameters on a skipped head.
        """
        if self.method == SKIP:
            if self.parameters:
                raise ConfigError(f"{path}.parameters", f"a skipped head takes none, got {self.parameters}")
            return None
        if self.method is not None:
            return get_method(self.method, **self.parameters)
        return with_parameters(base, self.parameters)


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that run under one method; `method` None: they are skipped and their output is zero."""

    method: Method | None
    heads: tuple[int, ...]


class LaterHeads(BaseModel):
    """Rows of a table that replace those before from a step on.

    Args:
        step: the first denoising step they hold for, at least 1.
        heads: as in `HeadTable`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: Annotated[int, Field(ge=1)]
    heads: _Rows


class HeadTable(BaseModel):
    """A table layer x head -> mode (arXiv 2502.04507 and 2506.03065 search such tables offline).

    Args:
        modes: the palette, by name.
        heads: one row per attention layer in execution order, one name of the palette per head.
        later: rows for later steps, each until the next ones begin. Default: `heads` holds throughout.

    Raises:
        ConfigError: through `make` and `load`, by dotted path: ragged rows, an unknown mode, method or parameter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    modes: dict[str, HeadMode]
    heads: _Rows
    later: Annotated[tuple[LaterHeads, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()

    @classmethod
    def make(cls, values: Any, path: str = "head_table") -> HeadTable:
        """Validate a mapping, the path of a file, or a table; faults are `ConfigError`s under `path`."""
        if isinstance(values, HeadTable):
            return values
        if isinstance(values, (str, Path)):
            return cls.load(values)
        if not isinstance(values, Mapping):
            raise ConfigError(path, f"expected the path of a file or a mapping, got {values!r}")
        try:
            table = cls(**{key: value for key, value in values.items() if key != "format"})
        except ValidationError as error:
            raise config_error(error, path, list(cls.model_fields)) from None
        table._check(path)
        return table

    def _check(self, path: str) -> None:
        if not self.heads or not self.heads[0]:
            raise ConfigError(f"{path}.heads", "expected at least one layer and one head")
        self._check_rows(self.heads, f"{path}.heads")
        for number, (before, part) in enumerate(zip((0, *self.starts), self.later, strict=False)):
            where = f"{path}.later.{number}"
            if number and part.step <= before:
                raise ConfigError(f"{where}.step", f"expected a step after {before}, got {part.step}")
            if len(part.heads) != self.layer_count:
                raise ConfigError(f"{where}.heads", f"expected {self.layer_count} layers, got {len(part.heads)}")
            self._check_rows(part.heads, f"{where}.heads")
        for name, mode in self.modes.items():
            if mode.method is not None:
                mode.resolve(get_method("dense"), f"{path}.modes.{name}")

    def _check_rows(self, rows: _Rows, path: str) -> None:
        for layer, row in enumerate(rows):
            if len(row) != self.head_count:
                raise ConfigError(f"{path}.{layer}", f"expected {self.head_count} heads, got {len(row)}")
            for head, name in enumerate(row):
                if name not in self.modes:
                    raise ConfigError(
                        f"{path}.{layer}.{head}", f"unknown mode {name!r}{near_matches(name, self.modes)}"
                    )

    @property
    def starts(self) -> tuple[int, ...]:
        """The steps from which `later` rows hold."""
        return tuple(part.step for part in self.later)

    @property
    def all_rows(self) -> tuple[_Rows, ...]:
        """The rows of the first steps, and those of each later range of steps."""
        return (self.heads, *(part.heads for part in self.later))

    def phase(self, step: int) -> int:
        """Which of `all_rows` holds at a step."""
        return bisect_right(self.starts, step)

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return len(self.heads)

    @property
    def head_count(self) -> int:
        """Number of heads per layer."""
        return len(self.heads[0])

    def check_size(self, layers: int | None = None, heads: int | None = None) -> None:
        """Refuse a model of another size.

        Raises:
            ConfigError: the model has another number of layers or heads than the table.
        """
        for what, ours, theirs in (("layers", self.layer_count, layers), ("heads", self.head_count, heads)):
            if theirs is not None and ours != theirs:
                raise ConfigError("head_table.heads", f"the table is for {ours} {what}, the model has {theirs}")

    def groups(self, layer: int, base: Method, step: int = 0) -> tuple[HeadGroup, ...]:
        """The heads of `layer` by method, in the order of their first head; each group runs once.

        Args:
            layer: index of the attention layer.
            base: the method that entries without a name change.
            step: denoising step, for tables that change over the steps.

        Raises:
            ConfigError: a parameter of an entry that `base` does not take.
        """
        members: dict[Method | None, list[int]] = {}
        for head, name in enumerate(self.all_rows[self.phase(step)][layer]):
            members.setdefault(self.modes[name].resolve(base, f"head_table.modes.{name}"), []).append(head)
        return tuple(HeadGroup(method, tuple(heads)) for method, heads in members.items())

    def all_groups(self, bases: Sequence[Method]) -> list[HeadGroup]:
        """The groups of all layers and ranges of steps, given the method of each layer; see `groups`."""
        of_layers = list(enumerate(bases[: self.layer_count]))
        return [g for step in (0, *self.starts) for layer, base in of_layers for g in self.groups(layer, base, step)]

    def methods(self, bases: Sequence[Method]) -> list[Method]:
        """Every method that some head runs under, given the method of each layer; skipped heads have none."""
        return [group.method for group in self.all_groups(bases) if group.method is not None]

    def slice(self, layers: slice = slice(None), heads: slice = slice(None)) -> HeadTable:
        """The table of some layers and heads, with the modes that they use."""
        first, *others = (tuple(row[heads] for row in rows[layers]) for rows in self.all_rows)
        used = {name for rows in (first, *others) for row in rows for name in row}
        later = tuple(LaterHeads(step=step, heads=rows) for step, rows in zip(self.starts, others, strict=True))
        return HeadTable.make(
            {"modes": {n: m for n, m in self.modes.items() if n in used}, "heads": first, "later": later}
        )

    def shares(self) -> dict[str, float]:
        """Share of the heads of each mode, most frequent first; ranges of steps count alike."""
        count = Counter(name for rows in self.all_rows for row in rows for name in row)
        return {name: n / count.total() for name, n in count.most_common()}

    def render(self) -> str:
        """The table as text: one line per layer, one sign per head, and a legend; blocks for ranges of steps."""
        signs = dict(zip(self.shares(), string.digits + string.ascii_letters, strict=False))
        lines = []
        for start, rows in zip((0, *self.starts), self.all_rows, strict=True):
            lines += [f"from step {start}"] if self.later else []
            lines += [f"{layer:3d} " + "".join(signs.get(n, "?") for n in row) for layer, row in enumerate(rows)]
        for name, share in self.shares().items():
            mode = self.modes[name]
            what = " ".join(str(part) for part in (mode.method or "", mode.parameters or "") if part)
            lines.append(f"  {signs.get(name, '?')} {share:6.1%} {name}" + (f": {what}" if what else ""))
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the table as YAML (`.yaml`, `.yml`) or safetensors (`.safetensors`).

        Raises:
            ConfigError: another suffix.
        """
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        modes = {name: mode.model_dump(mode="json", exclude_defaults=True) for name, mode in self.modes.items()}
        if _suffix(path) == "safetensors":
            names = list(self.modes)
            index = [
                torch.tensor([[names.index(n) for n in row] for row in rows], dtype=torch.int32)
                for rows in self.all_rows
            ]
            meta = {"format": FORMAT, "modes": json.dumps(modes), "starts": json.dumps(self.starts)}
            save_file({"heads": torch.stack(index)}, temporary, metadata=meta)
        else:
            values = {"format": FORMAT, "modes": modes, **self.model_dump(mode="json", include={"heads"})}
            values |= self.model_dump(mode="json", include={"later"}) if self.later else {}
            text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=10**6)
            temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> HeadTable:
        """Read a table written by `save`.

        Raises:
            ConfigError: no such file, not a table, or inconsistent contents.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError("head_table", f"no file {str(path)!r}")
        try:
            values = _read_tensors(path) if _suffix(path) == "safetensors" else yaml.safe_load(path.read_bytes())
        except (yaml.YAMLError, SafetensorError, UnicodeDecodeError, IndexError, KeyError) as error:
            raise ConfigError(f"head_table ({path})", f"cannot be read: {error}") from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise ConfigError(f"head_table ({path})", f"expected a file of format {FORMAT!r}, got {found!r}")
        return cls.make(values, f"head_table ({path})")


def _suffix(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml", ".safetensors"):
        raise ConfigError("head_table", f"expected a .yaml, .yml or .safetensors file, got {str(path)!r}")
    return path.suffix[1:]


def _read_tensors(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata() or {}
        modes = json.loads(meta.get("modes", "{}"))
        names, index, starts = list(modes), file.get_tensor("heads"), json.loads(meta.get("starts", "[]"))
    # A table that holds throughout may stand without the axis of step ranges.
    first, *others = [
        [[names[i] if 0 <= i < len(names) else f"number {i}" for i in row] for row in rows]
        for rows in index.reshape(-1, *index.shape[-2:]).tolist()
    ]
    later = [{"step": step, "heads": rows} for step, rows in zip(starts, others, strict=True)]
    return {"format": meta.get("format"), "modes": modes, "heads": first, "later": later}
