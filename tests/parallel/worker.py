"""One of two processes: every case alone, then sharded over both, and the largest difference of the outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import dit_accel
from dit_accel.cli.parallel import joined, processes_here
from dit_accel.errors import UnsupportedError
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline

SMALL = {"density": 0.4, "tile": [1, 2, 2], "remainder": "drop", "break_even": 1.0}
TILES = {"window": [1, 1, 3], "tile": [1, 2, 2], "break_even": 1.0}
NEAR = {"window": [1, 5, 3], "break_even": 1.0}
TABLE = {
    "modes": {
        "few": {"method": "composed", "parameters": {"density": 0.3, "tile": [1, 2, 2]}},
        "all": {"method": "dense"},
        "none": {"method": "skip"},
    }
}


def captured(name):
    """The transformer of a tiny pipeline and the arguments of its first call."""
    pipe, seen = tiny_pipeline(name), []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe(**{**tiny_arguments(name), "num_inference_steps": 1, "output_type": "latent"})
    handle.remove()
    return pipe.transformer.eval(), seen[0]


def forward(model, kwargs, **settings):
    with dit_accel.accelerate(model, **settings) as acceleration, torch.no_grad():
        out = model(**{**kwargs, "return_dict": False})[0]
        calls = acceleration.report().to_dict()["calls"]
    assert all(call["reason"] is None for call in calls) == (settings["method"] != "dense"), calls
    return out


def compare(name, anything, odd=False, degree="ulysses", **settings):
    model, kwargs = captured(name)
    if odd:  # an odd number of frames, rows and columns, and so of tokens
        kwargs["hidden_states"] = kwargs["hidden_states"][:, :, :1, :-2, :-2]
        grid = (1, *(size // 2 for size in kwargs["hidden_states"].shape[3:]))
        assert grid[1] * grid[2] % 2 == 1, grid
    if "head_table" in settings:
        heads = model.config.num_attention_heads
        rows = [
            [("few", "all", "none")[(layer + head) % 3] for head in range(heads)] for layer in range(len(model.blocks))
        ]
        settings["head_table"] = {**TABLE, "heads": rows}
    alone = forward(model, kwargs, **settings)
    config = ContextParallelConfig(**{f"{degree}_degree": 2, f"{degree}_anything": anything})
    model.enable_parallelism(config=config)
    return (forward(model, kwargs, **settings) - alone).abs().max().item() / alone.abs().max().item()


def compare_later(name, **settings):
    """As `compare`, with parallelism switched on under acceleration; and the stock model after its removal."""
    model, kwargs = captured(name)
    expected = [forward(model, kwargs, **settings), forward(model, kwargs, method="dense")]
    acceleration = dit_accel.accelerate(model, **settings)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    kwargs["return_dict"] = False
    with torch.no_grad():
        sparse = model(**kwargs)[0]
        acceleration.remove()
        stock = model(**kwargs)[0]
    return [((got - e).abs().max() / e.abs().max()).item() for got, e in zip((sparse, stock), expected, strict=True)]


def refusal_of_ring():
    """What cannot work is refused by name."""
    model, kwargs = captured("wan2.1-t2v")
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    try:
        forward(model, kwargs, method="composed", **SMALL)
    except UnsupportedError as error:
        return str(error)


def main(target: Path) -> None:
    torch.set_num_threads(1)
    with joined(processes_here(), "cpu"):
        results, told = measure(), refusal_of_ring()
        if dist.get_rank() == 0:
            target.write_text(json.dumps({"differences": results, "refusal": told}))


def measure():
    """The largest relative difference of each case."""
    later, stock = compare_later("flux1-dev", method="composed", **SMALL)
    return {
        "flux composed, parallel later": later,
        "flux stock, parallel since acceleration": stock,
        "wan dense": compare("wan2.1-t2v", True, method="dense"),
        "wan composed": compare("wan2.1-t2v", True, method="composed", **SMALL),
        "wan composed, odd": compare("wan2.1-t2v", True, odd=True, method="composed", **SMALL),
        "wan radial": compare("wan2.1-t2v", True, method="radial", block=4, break_even=1.0),
        "wan head table": compare("wan2.1-t2v", True, method="composed", head_table=True, **SMALL),
        "wan tiles, ring": compare("wan2.1-t2v", False, degree="ring", method="sliding_tile", **TILES),
        "wan tiles, odd, ring": compare("wan2.1-t2v", True, odd=True, degree="ring", method="sliding_tile", **TILES),
        "flux neighborhood, ring": compare("flux1-dev", True, degree="ring", method="neighborhood", **NEAR),
        "flux composed": compare("flux1-dev", False, method="composed", **SMALL),
        "flux composed, any length": compare("flux1-dev", True, method="composed", **SMALL),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
