"""A small plan of a calibration, with methods and a layout that fit no block."""

from __future__ import annotations

from dit_accel.calibrate.run import Plan
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.presets import Generation, load_preset
from dit_accel.schedule import Schedule

LAYOUT = TokenLayout((3, 7, 9), 5, "after", (194, 190))
METHODS = {
    "tiles": get_method("composed", tile=(2, 3, 3), density=0.3),
    "windows": get_method("neighborhood", density=0.3),
    "bands": get_method("radial", block=16),
    "dense": get_method("dense"),
}
SIZES = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "fps": 5}


def small_plan(**changes):
    # Not as it ships: what is written must keep that.
    preset = load_preset("tiny-wan/composed").model_copy(update={"schedule": Schedule.make(dense_steps=[[1, 2]])})
    candidates = changes.pop("candidates", {name: METHODS[name] for name in ("tiles", "bands", "dense")})
    generation = changes.pop("generation", Generation(**SIZES))
    return Plan(preset, candidates, ("a red ball", "a blue box"), generation, **changes)
