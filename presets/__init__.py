"""Named presets: one YAML file per model, with variants, their schema and their loader."""

from dit_accel.presets.loader import list_presets, load_preset, streaming_preset
from dit_accel.presets.schema import Generation, MethodSpec, ModelFacts, Preset

__all__ = ["Generation", "MethodSpec", "ModelFacts", "Preset", "list_presets", "load_preset", "streaming_preset"]
