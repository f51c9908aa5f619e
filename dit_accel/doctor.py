"""What this machine can run: backends and their self-tests, the choice for each preset, versions, what to install."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dit_accel.bench.timing import available_bytes
from dit_accel.errors import UnsupportedError
from dit_accel.estimate import block_parameters
from dit_accel.kernels.registry import Request, backends, choose_backend
from dit_accel.kernels.selftest import fault_of
from dit_accel.methods.registry import get_method
from dit_accel.presets import Preset, list_presets, load_preset

_HEAD_DIMS = (64, 128)
_BLOCK = 64

_BREAKS = (
    ("torch", "<2.6", "attention over masks of the CPU and FlexAttention differ; install torch>=2.6"),
    (
        "diffusers",
        "<0.42",
        "pipelines announce no step index, and attention processors differ; install diffusers>=0.42",
    ),
    ("triton", "<3.4", "is older than the kernels are written for; install triton>=3.4"),
    ("transformers", "<4.52", "text encoders load under other names; install transformers>=4.52"),
)
_BREAKS_ON_CUDA = (
    (
        "torch",
        "==2.9.*",
        "computes 3-D convolutions in bfloat16 without cuDNN, so video is decoded far slower, in more memory "
        "(PyTorch issues 166643 and 174051); install torch>=2.10",
    ),
)
_INSTALLS = (
    ("triton", "'dit_accel[gpu]'", "the Triton kernels (Linux, a GPU)"),
    ("xformers", "'dit_accel[gpu]'", "faster dense attention on older GPUs"),
    ("skimage", "'dit_accel[metrics]'", "PSNR and SSIM in `dit-accel compare`"),
    ("matplotlib", "'dit_accel[metrics]'", "the plot of `dit-accel compare`"),
    ("torchmetrics", "'dit_accel[metrics]'", "LPIPS in `dit-accel compare`"),
    ("torchvision", "torchvision", "LPIPS in `dit-accel compare`"),
    ("gradio", "'dit_accel[demo]'", "`dit-accel demo`"),
    ("ray", "'dit_accel[ray]'", "batches on several machines"),
    ("torchao", "torchao", "quantised weights (`extras.quantization`)"),
)
"""Module, what to install, what it gives."""


@dataclass(frozen=True)
class BackendFinding:
    """One backend on this machine.

    Args:
        name: of the backend.
        text: usable or not, and how its self-tests went.
        faults: self-tests that failed.
    """

    name: str
    text: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which backend a preset would use here, and why."""

    preset: str
    method: str
    backend: str
    why: str


def here() -> tuple[torch.device, tuple[torch.dtype, ...]]:
    """The device models run on by default, and the dtypes they run in there; the first is the default."""
    if torch.cuda.is_available():
        return torch.device("cuda"), (torch.bfloat16, torch.float16)
    return torch.device("cpu"), (torch.float32, torch.bfloat16)


def backend_findings(test: bool = True) -> Iterator[BackendFinding]:
    """Each backend, whether it is usable here, and with `test` the outcome of its self-tests."""
    device, dtypes = here()
    for name, reason in backends(Request(device, dtypes[0], _HEAD_DIMS[0])).items():
        if reason is not None:
            yield BackendFinding(name, f"not usable: {reason}")
        elif not test:
            yield BackendFinding(name, "usable")
        else:
            outcomes = list(_self_tests(name, device, dtypes))
            faults = tuple(told for told in outcomes if told is not None)
            yield BackendFinding(
                name, f"usable; {len(outcomes) - len(faults)} self-tests passed, {len(faults)} failed", faults
            )


def _self_tests(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[str | None]:
    """The fault of a backend, or None, for each dtype and head size that it can serve."""
    for dtype in dtypes:
        for dim in _HEAD_DIMS:
            request = Request(device, dtype, dim)
            if backends(request)[name] is not None:
                continue
            try:
                fault = fault_of(choose_backend(name, request), request)
            except UnsupportedError as error:
                fault = str(error)
            yield None if fault is None else f"with {str(dtype)[6:]} and head_dim {dim}: {fault}"


def backend_choices(family: str | None = None, every: bool = False) -> Iterator[Choice]:
    """The backend that shipped presets would use on this machine.

    Args:
        family: only presets of this family. Default: all.
        every: all variants, not only the recommended one of each model.
    """
    for name in (name for name in list_presets(family) if every or "/" not in name):
        preset = load_preset(name)
        if preset.method.name == "dense":
            yield Choice(name, "dense", "Diffusers' own", "the method is dense")
            continue
        yield _choice(preset)


def _choice(preset: Preset) -> Choice:
    device, dtypes = here()
    method = get_method(preset.method.name, **preset.method.parameters)
    block = int(getattr(method, "block", _BLOCK))
    request = Request(
        device,
        dtypes[0],
        preset.model.head_dim,
        remainder=method.remainder,
        precision=method.precision,
        q_size=block,
        k_size=block,
    )
    try:
        chosen = choose_backend("auto", request)
    except UnsupportedError as error:
        return Choice(preset.name, method.name, "none", str(error))
    passed = "; ".join(f"not {name}: {reason}" for name, reason in backends(request).items() if reason is not None)
    why = f"fastest of those usable with {device.type}, {str(dtypes[0])[6:]}, head_dim {request.head_dim}"
    return Choice(preset.name, method.name, chosen.name, why + (f" ({passed})" if passed else ""))


def known_to_break() -> Iterator[str]:
    """Installed versions that are known to break something, with what to do."""
    for package, bad, told in (*_BREAKS, *(_BREAKS_ON_CUDA if torch.version.cuda is not None else ())):
        try:
            version = Version(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
        if SpecifierSet(bad, prereleases=True).contains(version):
            yield f"{package} {version} {told}"
    other = _triton_of_torch()
    if other is not None:
        yield other
    if torch.version.cuda is None and _has_nvidia_driver():
        yield f"torch {torch.__version__} is built without CUDA, but there is an NVIDIA driver; install a CUDA build"


def _triton_of_torch() -> str | None:
    """The Triton that the installed torch was built with, where that is another than the one installed."""
    for text in metadata.requires("torch") or []:
        needed = Requirement(text)
        if needed.name == "triton" and util.find_spec("triton") and (needed.marker is None or needed.marker.evaluate()):
            version = metadata.version("triton")
            if not needed.specifier.contains(version, prereleases=True):
                return f"triton {version} is not the one that torch was built with; install triton{needed.specifier}"
    return None


def _has_nvidia_driver() -> bool:
    from pathlib import Path

    return Path("/proc/driver/nvidia/version").exists()


def installs() -> Iterator[str]:
    """What is not installed, what it would give, and the command that installs it."""
    for module, package, gives in _INSTALLS:
        if util.find_spec(module) is None and ("gpu" not in package or torch.cuda.is_available()):
            yield f"pip install {package} gives {gives}"


def weights(family: str | None = None, every: bool = False) -> Iterator[tuple[str, str]]:
    """Preset, and whether the weights of its blocks fit into the memory that is free on the default device.

    Args:
        family, every: as in `backend_choices`.
    """
    device, dtypes = here()
    free = available_bytes(device)
    if free is None:
        return
    for name in (name for name in list_presets(family) if every or "/" not in name):
        model = load_preset(name).model
        least = block_parameters(model) * dtypes[0].itemsize
        most = least if model.text == "cross" else 2 * least
        verdict = "fit" if most <= free else "may fit" if least <= free else "do not fit"
        size = " to ".join(f"{part / 2**30:.1f}" for part in dict.fromkeys((least, most)))
        told = f"{verdict} into {free / 2**30:.1f} GiB free on {device.type}"
        yield name, f"about {size} GiB in {str(dtypes[0])[6:]}, {told}"


def memory() -> str:
    """Free memory of the process's machine, and of each CUDA device."""
    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    known = ((place, available_bytes(place)) for place in places)
    return ", ".join(f"{free / 2**30:.1f} GiB free on {place}" for place, free in known if free is not None)
