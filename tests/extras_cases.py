"""What the tests of extras share: presets with extras at the size of a test, and offload without an accelerator."""

from __future__ import annotations

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from preset_cases import arguments, shrunk

from dit_accel.extras.settings import Extras
from dit_accel.presets import load_preset

STEPS = 6
SPARSE = {"method": "composed", "order": "tile", "tile": [1, 2, 2], "density": 0.4, "break_even": 1.0}
# Parameters with which every cache skips something in six steps.
CACHES = {
    "first_block": {"threshold": 10.0},
    "mag": {"mag_ratios": [1.0] * STEPS, "threshold": 1.0, "retention_ratio": 0.2},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": "float32"},
    "pab": {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 999]},
    "faster": {
        "spatial_attention_timestep_skip_range": [-1, 999],
        "unconditional_batch_timestep_skip_range": [-1, 999],
        "unconditional_batch_skip_range": 3,
    },
    "sea": {"threshold": 10.0},
}
WAN, WAN_TWO, IMAGE, COG = "wan2.1-t2v-1.3b-480p", "wan2.2-t2v-a14b-720p", "flux1-dev", "cogvideox-5b"
OFFLOADS = [
    {"mode": "group", "type": "leaf_level"},
    {"mode": "group", "type": "block_level", "blocks": 1},
    {"mode": "sequential"},
    {"mode": "model"},
]


def with_extras(name, **extras):
    preset = shrunk(load_preset(name), STEPS)
    return preset.model_copy(update={"extras": Extras(**extras)})


def cached(name, cache):
    return with_extras(name, cache={"name": cache, "parameters": CACHES[cache]})


def generate(pipe, preset, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(**arguments(pipe, preset, generator=generator, **more))[0])


def offload_to_the_cpu(monkeypatch, pipe):
    """Let Diffusers' and Accelerate's own offload hooks run with the CPU in the accelerator's place."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("dit_accel.extras.install._accelerator", lambda: torch.device("meta"))
    group = pipe.enable_group_offload
    monkeypatch.setattr(pipe, "enable_group_offload", lambda **given: group(**given | {"onload_device": cpu}))

    def sequential(device):
        cpu_offload(pipe.transformer, execution_device=cpu)

    def whole(device):
        pipe._all_hooks = [cpu_offload_with_hook(pipe.transformer, execution_device=cpu)[1]]

    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", sequential)
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", whole)
