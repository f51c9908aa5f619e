"""How close two clips are, and how steady one is. The arithmetic is that of scikit-image and torchmetrics.

Clips are `[T, H, W, 3]`, float in [0, 1]. Needs the `metrics` extra.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import numpy as np

from dit_accel.errors import UnsupportedError

IDENTICAL_PSNR = 100.0
"""PSNR in dB that stands for identical clips, whose PSNR is infinite."""
_BACKBONE = "alexnet-owt-*.pth"


@dataclass(frozen=True)
class Closeness:
    """How close a clip is to a reference.

    Args:
        psnr: in dB over the whole clip; `IDENTICAL_PSNR` for identical clips.
        ssim: mean over the frames.
        lpips: mean over the frames; None where its weights are not on this machine.
    """

    psnr: float
    ssim: float
    lpips: float | None


def closeness(clip: np.ndarray, reference: np.ndarray) -> Closeness:
    """PSNR, SSIM and, where its weights are present, LPIPS of `clip` against `reference`.

    Raises:
        UnsupportedError: scikit-image is not installed.
        ValueError: the clips differ in shape.
    """
    if clip.shape != reference.shape:
        raise ValueError(f"closeness: the clips have shapes {clip.shape} and {reference.shape}")
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError:
        raise UnsupportedError("metrics need scikit-image: pip install 'dit_accel[metrics]'") from None
    frames = zip(clip, reference, strict=True)
    # Frames smaller than the usual window of 7 take the largest odd one that fits.
    window = min(7, *(size - 1 + size % 2 for size in clip.shape[1:3]))
    similar = [structural_similarity(a, b, channel_axis=-1, data_range=1.0, win_size=window) for a, b in frames]
    if np.array_equal(clip, reference):
        psnr = IDENTICAL_PSNR
    else:
        psnr = min(IDENTICAL_PSNR, float(peak_signal_noise_ratio(reference, clip, data_range=1.0)))
    return Closeness(psnr, statistics.mean(float(s) for s in similar), lpips(clip, reference))


def check_metrics(plots: bool = False) -> None:
    """Find out now, and not when clips have been made, whether they can be compared.

    Args:
        plots: they are to be plotted too. Default False.

    Raises:
        UnsupportedError: scikit-image, or matplotlib for plots, is not installed.
    """
    needed = {"skimage": "scikit-image", **({"matplotlib": "matplotlib"} if plots else {})}
    for module, package in needed.items():
        if util.find_spec(module) is None:
            raise UnsupportedError(f"comparing needs {package}: pip install 'dit_accel[metrics]'")


def flicker(clip: np.ndarray) -> float:
    """Mean absolute change from frame to frame, in [0, 1]; 0 for a single frame.

    It holds motion too: compare it with that of a reference of the same prompt and seed.
    """
    return float(np.abs(np.diff(clip.astype(np.float64), axis=0)).mean()) if len(clip) > 1 else 0.0


def why_no_lpips() -> str | None:
    """Why LPIPS cannot be computed here without a download, or None when it can."""
    for package in ("torchmetrics", "torchvision"):
        if util.find_spec(package) is None:
            return f"{package} is not installed"
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return None if any(folder.glob(_BACKBONE)) else f"the weights {_BACKBONE} are not in {folder}"


def lpips(clip: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean LPIPS of the frames (AlexNet, arXiv 1801.03924); None where its weights are not on this machine."""
    if why_no_lpips() is not None:
        return None
    import torch
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    a, b = (torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2) for x in (clip, reference))
    return float(learned_perceptual_image_patch_similarity(a, b, net_type="alex", normalize=True))
