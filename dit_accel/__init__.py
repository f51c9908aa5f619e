"""dit_accel: training-free acceleration of the diffusion transformers in Diffusers.

>>> import dit_accel
>>> acc = dit_accel.accelerate(pipe, preset="wan2.1-t2v-1.3b-480p")  # doctest: +SKIP
>>> frames = pipe(prompt="a red ball moving right").frames[0]  # doctest: +SKIP
>>> print(acc.summary())  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.acceleration import accelerate
    from dit_accel.errors import ConfigError, DitAccelError, PlanError, UnsupportedError
    from dit_accel.handle import Acceleration
    from dit_accel.head_table import HeadTable
    from dit_accel.layout import TokenLayout
    from dit_accel.methods.registry import get_method, list_methods
    from dit_accel.order import TokenOrder
    from dit_accel.plan import BlockPlan
    from dit_accel.presets import list_presets, load_preset
    from dit_accel.schedule import Schedule

# Name -> module. Imported at first use, so that the command line starts without loading torch.
_PUBLIC = {
    "Acceleration": "dit_accel.handle",
    "accelerate": "dit_accel.acceleration",
    "ConfigError": "dit_accel.errors",
    "DitAccelError": "dit_accel.errors",
    "PlanError": "dit_accel.errors",
    "UnsupportedError": "dit_accel.errors",
    "HeadTable": "dit_accel.head_table",
    "TokenLayout": "dit_accel.layout",
    "get_method": "dit_accel.methods.registry",
    "list_methods": "dit_accel.methods.registry",
    "TokenOrder": "dit_accel.order",
    "BlockPlan": "dit_accel.plan",
    "list_presets": "dit_accel.presets",
    "load_preset": "dit_accel.presets",
    "Schedule": "dit_accel.schedule",
}

__all__ = [
    "Acceleration",
    "BlockPlan",
    "ConfigError",
    "DitAccelError",
    "HeadTable",
    "PlanError",
    "Schedule",
    "TokenLayout",
    "TokenOrder",
    "UnsupportedError",
    "accelerate",
    "get_method",
    "list_methods",
    "list_presets",
    "load_preset",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
