"""Published causal Wan weights into Diffusers' `WanTransformer3DModel`: unpack, rename, merge, and refuse what is left.

Known layouts: Self-Forcing, CausVid, Rolling Forcing, Causal-Forcing, Reward Forcing (a dict of state dicts with
prefixes), LongLive (the same, and a LoRA to merge), Krea (one safetensors file), and Diffusers' own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_accel.errors import ConfigError

_CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("base_model.model.", "module.", "model.diffusion_model.", "model.")
_LORA_CONTAINER = "generator_lora"
_LORA_A, _LORA_B = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class CausalWeights:
    """Where published weights are, and how they stream.

    Args:
        repository: hub id.
        file: path of the weights in it.
        lora: path of a LoRA to merge. Default: none.
        stream: name in `dit_accel.streaming.STREAM_PRESETS`.
        license: as the project states it.
    """

    repository: str
    file: str
    stream: str
    license: str
    lora: str | None = None


CAUSAL_WEIGHTS: dict[str, CausalWeights] = {
    "self-forcing": CausalWeights(
        "gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", "self-forcing", "Apache-2.0"
    ),
    "causvid": CausalWeights("tianweiy/CausVid", "autoregressive_checkpoint/model.pt", "causvid", "CC BY-NC-SA 4.0"),
    "rolling-forcing": CausalWeights(
        "TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt", "rolling-forcing", "academic use only"
    ),
    "causal-forcing": CausalWeights(
        "zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt", "self-forcing", "Apache-2.0"
    ),
    "reward-forcing": CausalWeights("JaydenLyh/Reward-Forcing", "rewardforcing.pt", "reward-forcing", "see repository"),
    "longlive": CausalWeights(
        "Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt", "longlive", "Apache-2.0", "models/lora.pt"
    ),
}
"""Weights for the 1.3B text-to-video model, by project."""


def find_weights(path: str | Path, argument: str = "checkpoint") -> Path:
    """The file of a checkpoint, which is there.

    Raises:
        ConfigError: no such file; under the name `argument`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(argument, f"no such file: {path}")
    return path


def read_weights(path: str | Path) -> dict[str, Any]:
    """A checkpoint as it is stored: safetensors, or a PyTorch file read with `weights_only=True`.

    Raises:
        ConfigError: no such file, or one that holds anything but tensors and plain containers.
    """
    path = find_weights(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("checkpoint", f"{path} cannot be read as weights alone: {reason}") from error


def transformer_weights(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, in the project's own names without wrappers and prefixes.

    Averaged weights ("generator_ema") are taken before the last ones ("generator").

    Raises:
        ConfigError: no state dict in it, or two keys that become one.
    """
    inner: Mapping[str, Any] = next((stored[name] for name in _CONTAINERS if _is_state_dict(stored.get(name))), stored)
    if not _is_state_dict(inner):
        raise ConfigError(
            "checkpoint", f"expected weights, or one of {', '.join(_CONTAINERS)}; got {sorted(stored)[:8]}"
        )
    out = {_plain(key): value for key, value in inner.items()}
    if len(out) != len(inner):
        raise ConfigError("checkpoint", "two keys have the same name once their prefixes are gone")
    return out


def merge_lora(
    weights: Mapping[str, Tensor], stored: Mapping[str, Any], alpha: float | None = None
) -> dict[str, Tensor]:
    """Weights with a PEFT LoRA added: W + alpha / rank * B A, in fp32, for every layer that the LoRA names.

    Args:
        weights: as from `transformer_weights`.
        stored: the LoRA, with or without its container "generator_lora".
        alpha: numerator of the scale. Default: the rank, as in LongLive (rank 256, alpha 256).

    Raises:
        ConfigError: a key that is not half of a pair, or a layer that does not exist or does not fit.
    """
    lora = {_plain(key).replace(".default.", "."): x for key, x in stored.get(_LORA_CONTAINER, stored).items()}
    merged = dict(weights)
    layers = {key.partition(_LORA_A)[0] for key in lora if _LORA_A in key}
    used = {f"{layer}{half}.weight" for layer in layers for half in (_LORA_A, _LORA_B)}
    if not layers or used != set(lora):
        raise ConfigError("lora", f"expected pairs of lora_A and lora_B, got also {sorted(used ^ set(lora))[:4]}")
    for layer in sorted(layers):
        a, b = lora[f"{layer}{_LORA_A}.weight"].float(), lora[f"{layer}{_LORA_B}.weight"].float()
        base = weights.get(f"{layer}.weight")
        if base is None or base.shape != (b.shape[0], a.shape[1]):
            found = "no such layer" if base is None else f"weights {tuple(base.shape)}"
            raise ConfigError("lora", f"{layer}: expected weights [{b.shape[0]}, {a.shape[1]}], got {found}")
        scale = 1.0 if alpha is None else alpha / a.shape[0]
        merged[f"{layer}.weight"] = (base.float() + scale * (b @ a)).to(base.dtype)
    return merged


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original Wan code to those of Diffusers; weights that have these already stay as they are."""
    if any(key.startswith("condition_embedder.") for key in weights):
        return dict(weights)
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return convert_wan_transformer_to_diffusers(dict(weights))


def load_causal_weights(
    transformer: nn.Module, path: str | Path, lora: str | Path | None = None, lora_alpha: float | None = None
) -> None:
    """Load published causal weights into a `WanTransformer3DModel`; every key must be used and every parameter filled.

    Args:
        transformer: keeps its dtype and device.
        path: ".safetensors", or a PyTorch file.
        lora: a LoRA to merge into the weights first.
        lora_alpha: see `merge_lora`.

    Raises:
        ConfigError: keys that are missing or left over, or shapes that differ; the message names the first of them.
    """
    weights = transformer_weights(read_weights(path))
    if lora is not None:
        weights = merge_lora(weights, read_weights(lora), lora_alpha)
    weights = to_diffusers(weights)
    expected = transformer.state_dict()
    missing, left = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or left:
        raise ConfigError("checkpoint", f"does not fit the transformer: missing {missing[:4]}, left over {left[:4]}")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            shapes = f"{tuple(expected[key].shape)}, got {tuple(value.shape)}"
            raise ConfigError("checkpoint", f"{key}: expected {shapes}; is this the same size of model?")
    transformer.load_state_dict(weights, strict=True)


def convert_to_safetensors(path: str | Path, target: str | Path, lora: str | Path | None = None) -> Path:
    """Write a checkpoint, with its LoRA merged, as safetensors in Diffusers' names.

    Returns:
        `target`.
    """
    weights = transformer_weights(read_weights(path))
    if lora is not None:
        weights = merge_lora(weights, read_weights(lora))
    target = Path(target)
    save_file({key: value.clone().contiguous() for key, value in to_diffusers(weights).items()}, target)
    return target


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(x, Tensor) for x in value.values())


def _plain(key: str) -> str:
    """A key without the names of wrappers and enclosing modules."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                key, stripped = key.removeprefix(prefix), True
    return key
