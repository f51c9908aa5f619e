"""What is timed on a GPU, most telling first, each task small enough to lose little when it fails.

Needs torch and Triton alone. Times are medians of a few calls between CUDA events, after one that does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench.kernels import KernelBench, KernelRow, device_seconds
from dit_accel.bench.options import Options
from dit_accel.bench.shapes import MODEL_SHAPES, SMALL_SHAPES, Shape, structured_qkv
from dit_accel.kernels import block_attention
from dit_accel.kernels.dense import dense_attention, exact_backends
from dit_accel.kernels.operations import uses_triton
from dit_accel.kernels.triton_configs import TILES, Features, architecture, cut, serves
from dit_accel.kernels.triton_launch import served_by
from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder
from dit_accel.orders.space import bisection_order
from dit_accel.plan import Blocking
from dit_accel.selection import TopK, pooled_scores, select_blocks, select_plan
from dit_accel.selection.covariance import error_scores
from dit_accel.selection.samples import sampled_scores
from dit_accel.selection.scores import antidiagonal_scores, subblock_scores

Task = dict[str, Any]
_FIRST_SHAPES = ("wan-1.3b", "cogvideox", "wan-14b", "hunyuan", "flux-2k")
_LAST_SHAPES = ("flux-4k", "flux-1k")
_FIRST_VARIANTS = ("exact", "order0", "mixed", "int8", "int8_fp8")
_LAST_VARIANTS = ("about", "global", "grouped", "diagonal")
_DENSITY_OF_SELECTION = 0.125


@dataclass(frozen=True)
class SpeedRow:
    """One line of the table of times; empty where nothing was timed and `note` says why.

    Args:
        kind: "roof", "dense", "kernel", "tile" or "step" (one step of choosing and ordering).
        shape: which call of which model.
        what: variant, backend, tile or step.
        density: share of the key blocks.
        ms: median time.
        dense_ms: that of the fastest dense attention, in the same rounds where `kind` is "kernel".
        ratio: how many times faster than dense.
        rate: TFLOP/s over the selected pairs (TB/s for a copy).
        efficiency: that rate as a share of the dense one.
        extra: time beyond exact blocks alone at this density, as a share of it.
        share: of the time of exact attention at density 12.5 %.
    """

    kind: str
    shape: str
    what: str
    heads: int | None = None
    density: float | None = None
    ms: float | None = None
    dense_backend: str = ""
    dense_ms: float | None = None
    ratio: float | None = None
    rate: float | None = None
    efficiency: float | None = None
    extra: float | None = None
    share: float | None = None
    note: str = ""


def speed_tasks(arch: int, tiny: bool = False) -> list[Task]:
    """Every timing, most telling first: what does not fit into the time is at the end."""
    if tiny:
        shape = "cpu-1k"
        tasks: list[Task] = [{"kind": "roof"}, {"kind": "dense", "shape": shape}, {"kind": "step", "shape": shape}]
        return tasks + [_kernel(shape, 0.25, name) for name in _FIRST_VARIANTS]
    tasks = [{"kind": "roof"}, *({"kind": "dense", "shape": name} for name in _FIRST_SHAPES)]
    for name in _FIRST_SHAPES:
        tasks += [_kernel(name, density, "exact") for density in (0.125, 0.25)]
    tasks += [_kernel(name, 0.125, variant) for name in _FIRST_SHAPES for variant in _FIRST_VARIANTS[1:]]
    tasks += [{"kind": "step", "shape": name} for name in ("wan-1.3b", "wan-14b", "hunyuan")]
    for name, dim in (("wan-1.3b", 128), ("cogvideox", 64)):
        halves = [place for place, tile in enumerate(TILES[arch][dim]) if not tile.fp32]
        tasks += [
            {"kind": "tile", "shape": name, "place": place, "q_block": q_block, "pattern": pattern}
            for place in halves
            for q_block, pattern in ((128, "random"), (64, "random"), (128, "window"))
        ]
    for density in (0.05, 0.5, 1.0):
        tasks += [_kernel(name, density, "exact") for name in _FIRST_SHAPES]
    tasks += [_kernel(name, 0.125, variant) for variant in _LAST_VARIANTS for name in _FIRST_SHAPES[:3]]
    tasks += [_kernel(name, 0.5, variant) for variant in ("mixed", "int8_fp8") for name in _FIRST_SHAPES]
    for name in _LAST_SHAPES:
        tasks += [{"kind": "dense", "shape": name}, *(_kernel(name, 0.125, variant) for variant in _FIRST_VARIANTS)]
    return tasks


def _kernel(shape: str, density: float, variant: str) -> Task:
    return {"kind": "kernel", "shape": shape, "density": density, "variant": variant}


@dataclass
class Stopwatch:
    """Runs timing tasks on one device; what the tasks of a shape share is kept until another shape comes.

    Args:
        options: device, dtype and rounds.
    """

    options: Options
    _benches: dict[tuple[str, int, str], KernelBench] = field(default_factory=dict)

    def run(self, task: Task) -> Iterator[SpeedRow]:
        """The rows of one task.

        Raises:
            Exception: whatever a compiler or a driver raises; the caller writes it down.
        """
        kinds: dict[str, Callable[[Task], Iterator[SpeedRow]]] = {
            "roof": self._roof,
            "dense": self._dense,
            "kernel": self._kernel,
            "tile": self._tile,
            "step": self._steps,
        }
        yield from kinds[task["kind"]](task)

    def _bench(self, name: str, q_block: int = 128, pattern: Any = "random") -> KernelBench:
        key = (name, q_block, pattern)
        if key not in self._benches:
            self._benches.clear()
            self._benches[key] = KernelBench(_shape(name), self.options, (q_block, 64), pattern)
        return self._benches[key]

    def _ms(self, run: Callable[[], object], rounds: int | None = None) -> float:
        run()
        times = [device_seconds(run, self.options.device) for _ in range(rounds or self.options.rounds)]
        return 1e3 * statistics.median(times)

    def _roof(self, task: Task) -> Iterator[SpeedRow]:
        device, dtype = self.options.device, self.options.dtype
        side = 8192 if device.type == "cuda" else 256
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        ms = self._ms(partial(torch.mm, a, b), 10)
        yield SpeedRow("roof", "", f"matrix product of {side}", ms=ms, rate=2e-9 * side**3 / ms)
        source = torch.empty(side, 16 * side, device=device, dtype=dtype)
        target = torch.empty_like(source)
        ms = self._ms(partial(target.copy_, source), 10)
        yield SpeedRow("roof", "", "copy, TB/s", ms=ms, rate=2e-9 * source.numel() * source.element_size() / ms)

    def _dense(self, task: Task) -> Iterator[SpeedRow]:
        bench = self._bench(task["shape"])
        q, k, v = bench.inputs
        operations = 4e-9 * bench.heads * q.shape[-1] * q.shape[2] ** 2
        for name in exact_backends(q):
            try:
                ms = self._ms(partial(dense_attention, q, k, v, backend=name))
            except RuntimeError as refused:  # as torch says that a kernel takes no such call
                yield SpeedRow("dense", task["shape"], name, bench.heads, note=str(refused).splitlines()[0])
                continue
            yield SpeedRow("dense", task["shape"], name, bench.heads, 1.0, ms, rate=operations / ms)

    def _kernel(self, task: Task) -> Iterator[SpeedRow]:
        bench, density = self._bench(task["shape"]), task["density"]
        if task["variant"] != "exact" and density not in bench.exact_ms:
            bench.row(density, "exact")
        yield _row_of(bench.row(density, task["variant"]))

    def _tile(self, task: Task) -> Iterator[SpeedRow]:
        """One tile of the table, whatever it would choose."""
        bench = self._bench(task["shape"], task["q_block"], task["pattern"])
        q, k, v = bench.inputs
        features = Features(q.shape[-1], q.dtype)
        arch = _arch(self.options.device)
        tile = cut(TILES[arch][features.padded_dim][task["place"]], features, task["q_block"], 64)
        what = f"{tile}, {task['pattern']} blocks, query blocks of {task['q_block']}"
        if not serves(tile, features, 64):
            yield SpeedRow("tile", task["shape"], what, note="it serves other calls")
            return
        with served_by(tile):
            for density in (0.125, 0.25):
                run = partial(block_attention, q, k, v, bench.plan(density), backend="triton")
                ms = self._ms(run)
                rate = 4e-9 * bench.heads * q.shape[-1] * q.shape[2] ** 2 * bench.plan(density).density / ms
                yield SpeedRow("tile", task["shape"], what, bench.heads, density, ms, rate=rate)

    def _steps(self, task: Task) -> Iterator[SpeedRow]:
        """Ordering and choosing alone, and attention by what was chosen."""
        shape, options = _shape(task["shape"]), self.options
        bench = self._bench(task["shape"])
        exact = self._ms(partial(bench.attend, _DENSITY_OF_SELECTION))
        self._benches.clear()
        layout = shape.layout
        q, k, v = structured_qkv(layout, bench.heads, shape.head_dim, options.device, options.dtype)
        order = bisection_order(layout, 64, (2, 2, 16)).to(options.device)
        blocks = layout.blocks(64)
        for name, run in _selection_steps(q, k, v, order, blocks, layout).items():
            ms = self._ms(run)
            yield SpeedRow("step", shape.name, name, bench.heads, None, ms, share=ms / exact)


def _shape(name: str) -> Shape:
    return (SMALL_SHAPES | MODEL_SHAPES)[name]


def _arch(device: torch.device) -> int:
    arch = architecture(torch.cuda.get_device_capability(device)) if device.type == "cuda" else 90
    assert arch is not None
    return arch


def _selection_steps(
    q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, blocks: Blocking, layout: TokenLayout
) -> dict[str, Callable[[], object]]:
    """The steps around attention by name, each a call without arguments."""
    scores = error_scores(q, k, v, blocks, layout)
    layer, row = (TopK(scope=scope, share=_DENSITY_OF_SELECTION, rounding="floor") for scope in ("layer", "row"))
    names = ("move", "rank", "block means", "block scores")
    where = {name: "Triton" if uses_triton(name, q) else "torch" for name in names}
    draw = torch.Generator(q.device).manual_seed(0)
    return {
        f"put q, k and v in order ({where['move']})": partial(order.apply, q, k, v),
        f"restore the output ({where['move']})": partial(order.restore, q),
        f"pooled scores ({where['block means']})": partial(pooled_scores, q, k, blocks, layout),
        "error scores": partial(error_scores, q, k, v, blocks, layout),
        f"antidiagonal scores ({where['block scores']})": partial(
            antidiagonal_scores, q, k, blocks, blocks, layout, 16
        ),
        f"sub-block scores ({where['block scores']})": partial(subblock_scores, q, k, blocks, blocks, layout, 4, 4),
        f"sampled scores ({where['block scores']})": partial(
            sampled_scores, q, k, blocks, blocks, layout, (16, 16), draw
        ),
        f"top-k of rows ({where['rank']})": partial(select_blocks, scores, row),
        "top-k of the layer": partial(select_blocks, scores, layer),
        "scores to plan, per row": partial(select_plan, scores, row, blocks, blocks, layout),
        "scores to plan, per layer": partial(select_plan, scores, layer, blocks, blocks, layout),
    }


def _row_of(row: KernelRow) -> SpeedRow:
    fields = asdict(row)
    kept = {
        name: fields[name] for name in ("heads", "dense_backend", "dense_ms", "ratio", "rate", "efficiency", "extra")
    }
    what = f"{row.variant} ({row.backend})" if row.backend else row.variant
    return SpeedRow("kernel", row.shape, what, density=row.requested_density, ms=row.attend_ms, note=row.note, **kept)
