"""Per-head tables: which method, with which parameters, each head of each layer runs under."""

from __future__ import annotations

import json
import os
import string
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
from dit_accel.methods.registry import config_error, get_method

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
        return get_method(base.name, **{**base.model_dump(exclude_unset=True), **self.parameters})


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that run under one method; `method` None: they are skipped and their output is zero."""

    method: Method | None
    heads: tuple[int, ...]


class HeadTable(BaseModel):
    """A table layer x head -> mode (arXiv 2502.04507 and 2506.03065 search such tables offline).

    Args:
        modes: the palette, by name.
        heads: one row per attention layer in execution order, one name of the palette per head.

    Raises:
        ConfigError: through `make` and `load`, by dotted path: ragged rows, an unknown mode, method or parameter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    modes: dict[str, HeadMode]
    heads: _Rows

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
        for layer, row in enumerate(self.heads):
            if len(row) != self.head_count:
                raise ConfigError(f"{path}.heads.{layer}", f"expected {self.head_count} heads, got {len(row)}")
            for head, name in enumerate(row):
                if name not in self.modes:
                    raise ConfigError(
                        f"{path}.heads.{layer}.{head}", f"unknown mode {name!r}{near_matches(name, self.modes)}"
                    )
        for name, mode in self.modes.items():
            if mode.method is not None:
                mode.resolve(get_method("dense"), f"{path}.modes.{name}")

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

    def groups(self, layer: int, base: Method) -> tuple[HeadGroup, ...]:
        """The heads of `layer` by method, in the order of their first head; each group runs once.

        Args:
            layer: index of the attention layer.
            base: the method that entries without a name change.

        Raises:
            ConfigError: a parameter of an entry that `base` does not take.
        """
        members: dict[Method | None, list[int]] = {}
        for head, name in enumerate(self.heads[layer]):
            members.setdefault(self.modes[name].resolve(base, f"head_table.modes.{name}"), []).append(head)
        return tuple(HeadGroup(method, tuple(heads)) for method, heads in members.items())

    def methods(self, bases: Sequence[Method]) -> list[Method]:
        """Every method that some head runs under, given the method of each layer; skipped heads have none."""
        groups = (group for layer, base in enumerate(bases[: self.layer_count]) for group in self.groups(layer, base))
        return [group.method for group in groups if group.method is not None]

    def slice(self, layers: slice = slice(None), heads: slice = slice(None)) -> HeadTable:
        """The table of some layers and heads, with the modes that they use."""
        rows = tuple(row[heads] for row in self.heads[layers])
        used = {name for row in rows for name in row}
        return HeadTable.make({"modes": {n: m for n, m in self.modes.items() if n in used}, "heads": rows})

    def shares(self) -> dict[str, float]:
        """Share of the heads of each mode, most frequent first."""
        count = Counter(name for row in self.heads for name in row)
        return {name: n / (self.layer_count * self.head_count) for name, n in count.most_common()}

    def render(self) -> str:
        """The table as text: one line per layer, one sign per head, and a legend."""
        signs = dict(zip(self.shares(), string.digits + string.ascii_letters, strict=False))
        lines = [f"{layer:3d} " + "".join(signs.get(n, "?") for n in row) for layer, row in enumerate(self.heads)]
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
            index = torch.tensor([[names.index(name) for name in row] for row in self.heads], dtype=torch.int32)
            meta = {"format": FORMAT, "modes": json.dumps(modes)}
            save_file({"heads": index}, temporary, metadata=meta)
        else:
            rows = [list(row) for row in self.heads]
            values = {"format": FORMAT, "modes": modes, "heads": rows}
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
        names, index = list(modes), file.get_tensor("heads")
    rows = [[names[i] if 0 <= i < len(names) else f"number {i}" for i in row] for row in index.tolist()]
    return {"format": meta.get("format"), "modes": modes, "heads": rows}
