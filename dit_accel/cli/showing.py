"""What presets look like before they run: the table of all, and what one would do."""

from __future__ import annotations

from rich.table import Table

from dit_accel.cli.app import console
from dit_accel.estimate import Machine, estimate, machine_here
from dit_accel.models import TINY
from dit_accel.presets import Preset, list_presets, load_preset


def presets_table(family: str | None, machine: Machine) -> Table:
    """Every preset with its size, method, density, attention share and predicted gain on `machine`."""
    caption = f"gain: predicted for a {machine.name} ({machine.source}); ?: the method decides its density in the run"
    table = Table("preset", "family", "task", "size", "method", "density", "attention", "gain", caption=caption)
    for name in list_presets(family):
        preset = load_preset(name)
        guess, size = estimate(preset, machine), preset.generation
        frames = "" if preset.makes_image else f"x{size.num_frames}"
        table.add_row(
            name,
            preset.family,
            preset.task,
            f"{size.height}x{size.width}{frames}",
            preset.method.name,
            "?" if guess.density is None else f"{guess.density:.2f}",
            f"{guess.attention_share:.0%}",
            "?" if guess.gain is None else f"{guess.gain:.2f}x",
        )
    return table


def show_preset(preset: Preset, model: str | None, device: str) -> None:
    """Print the resolved preset and what it would do on `device`; nothing is loaded."""
    console.print(preset.to_yaml().rstrip(), markup=False)
    if model == TINY:
        console.print(f"model: tiny random weights in place of {preset.repository} (not made), so no prediction")
        return
    guess = estimate(preset, machine_here(device))
    frames, height, width = guess.grid
    kind = "image" if preset.makes_image else "video"
    text = f", and {guess.text} of text" if guess.text else ""
    console.print(f"model: {model or preset.repository} (not loaded)", markup=False)
    console.print(f"{kind} tokens: {guess.tokens} ({frames} x {height} x {width}){text}")
    console.print(f"self-attention: {guess.attention_share:.0%} of the transformer's operations when dense")
    if guess.gain is None:
        console.print(
            f"{guess.dense_share:.0%} of the calls dense; predicted gain: not known before a run, since the method "
            "decides its density"
        )
        return
    console.print(f"expected density: {guess.density:.3f} in sparse calls, {guess.dense_share:.0%} of the calls dense")
    machine = guess.machine
    console.print(
        f"predicted gain of the denoising loop on a {machine.name}: {guess.gain:.2f}x (if a sparse pair costs "
        f"{1 / machine.efficiency:.2f} dense pairs, and selecting {machine.overhead:.0%} of dense attention; "
        f"{machine.source})",
        markup=False,
    )
