"""What a preset may switch on besides attention, all of it Diffusers' own: step cache, offload, casting, compilation,
quantisation. This file says what may be asked for; `install.py` does it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dit_accel.errors import ConfigError, UnsupportedError

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_QUANTIZERS = {
    "bitsandbytes_4bit": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_4bit": True}),
    "bitsandbytes_8bit": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_8bit": True}),
    "torchao": ("torchao", "TorchAoConfig", {}),
}


class StepCache(BaseModel):
    """A step cache of Diffusers, which skips work of some denoising steps.

    Args:
        name: which one.
        parameters: fields of Diffusers' config class; `num_inference_steps` and the callbacks are filled in.
    """

    model_config = _STRICT

    name: Literal["first_block", "mag", "taylorseer", "pab", "faster", "sea"]
    parameters: dict[str, Any] = Field(default_factory=dict)


class Offload(BaseModel):
    """Keep weights in main memory and bring them to the accelerator when they are needed.

    Args:
        mode: "model" moves one component at a time, "sequential" one layer at a time, "group" groups of layers.
        type: for "group": "leaf_level", or "block_level" with `blocks` transformer blocks at a time.
        blocks: for "block_level".
        stream: for "group": load the next group while this one computes (CUDA).
    """

    model_config = _STRICT

    mode: Literal["model", "sequential", "group"]
    type: Literal["leaf_level", "block_level"] = "leaf_level"
    blocks: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False


class LayerwiseCasting(BaseModel):
    """Store the transformer's weights in 8 bits and cast each layer up when it runs.

    Args:
        storage: type of the stored weights.
    """

    model_config = _STRICT

    storage: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn"


class Compile(BaseModel):
    """`torch.compile` of the transformer. Graphs break at our attention, so `fullgraph` is always off.

    Args:
        scope: "blocks" compiles each repeated block, which starts much sooner; "model" the whole transformer.
        mode: torch's mode. Default None: its default.
        dynamic: whether shapes may change without recompiling. Default None: torch decides.
        backend: torch's compiler backend.
        fullgraph: only False is possible.
    """

    model_config = _STRICT

    scope: Literal["blocks", "model"] = "blocks"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    dynamic: bool | None = None
    backend: str = "inductor"
    fullgraph: bool = False


class Quantization(BaseModel):
    """Weights in few bits, made while loading.

    Args:
        backend: "torchao", "bitsandbytes_8bit" or "bitsandbytes_4bit"; the library must be installed.
        parameters: further arguments of Diffusers' config class (`quant_type` of torchao: the name of its config).
        components: what is quantised.
    """

    model_config = _STRICT

    backend: Literal["torchao", "bitsandbytes_4bit", "bitsandbytes_8bit"]
    parameters: dict[str, Any] = Field(default_factory=dict)
    components: list[str] = Field(default_factory=lambda: ["transformer", "transformer_2"])


class Extras(BaseModel):
    """Everything that is switched on besides attention. Default: nothing.

    Args:
        cache: step cache.
        offload: where weights live.
        layerwise_casting: in what type weights are stored.
        compile: compilation.
        quantization: weights in few bits.
    """

    model_config = _STRICT

    cache: StepCache | None = None
    offload: Offload | None = None
    layerwise_casting: LayerwiseCasting | None = None
    compile: Compile | None = None
    quantization: Quantization | None = None

    def check(self) -> None:
        """Refuse what cannot work on any machine or model.

        Raises:
            ConfigError: the setting, and the reason.
        """
        if self.cache is not None:
            from dit_accel.extras.cache import check_cache

            check_cache(self.cache)
        if self.compile is not None and self.compile.fullgraph:
            raise ConfigError("extras.compile.fullgraph", "expected false, since graphs break at sparse attention")
        if self.quantization is not None and self.layerwise_casting is not None:
            raise ConfigError("extras.layerwise_casting", "quantised weights cannot be cast; choose one of the two")
        _check_offload(self.offload, self.compile)


def _check_offload(offload: Offload | None, compiled: Compile | None) -> None:
    if offload is None:
        return
    by_block = offload.mode == "group" and offload.type == "block_level"
    if by_block != (offload.blocks is not None):
        expected = "a number of blocks" if by_block else "nothing, except for type block_level of mode group"
        raise ConfigError("extras.offload.blocks", f"expected {expected}, got {offload.blocks}")
    if offload.stream and offload.mode != "group":
        raise ConfigError("extras.offload.stream", f"is for mode group, got mode {offload.mode}")
    if offload.mode == "sequential" and compiled is not None:
        raise ConfigError(
            "extras.offload.mode", "sequential offload replaces weights under compiled code; use group offload"
        )


def quantization_config(spec: Quantization) -> Any:
    """Diffusers' `PipelineQuantizationConfig` for `spec`.

    Raises:
        ConfigError: the library is not installed, or Diffusers refuses the parameters.
        UnsupportedError: bitsandbytes without an accelerator.
    """
    library, name, fixed = _QUANTIZERS[spec.backend]
    if importlib.util.find_spec(library) is None:
        raise ConfigError("extras.quantization.backend", f"{spec.backend} needs {library}: pip install {library}")
    import diffusers
    import torch

    if library == "bitsandbytes" and not any(device.is_available() for device in (torch.cuda, torch.xpu, torch.mps)):
        raise UnsupportedError(
            f"extras.quantization.backend: Diffusers quantises with {spec.backend} on an accelerator only; use torchao"
        )
    parameters = dict(spec.parameters)
    try:
        if library == "torchao":
            parameters["quant_type"] = _torchao_type(parameters.get("quant_type", "Int8WeightOnlyConfig"))
        config = getattr(diffusers, name)(**{**fixed, **parameters})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError("extras.quantization.parameters", " ".join(str(error).split())) from None
    mapping = dict.fromkeys(spec.components, config)
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def _torchao_type(name: Any) -> Any:
    """An object of torchao's own config class, by its name."""
    kind = getattr(importlib.import_module("torchao.quantization"), str(name), None)
    if not (isinstance(kind, type) and str(name).endswith("Config")):
        raise ConfigError(
            "extras.quantization.parameters.quant_type",
            f"expected the name of a config class of torchao.quantization such as Int8WeightOnlyConfig, got {name!r}",
        )
    return kind()


EXTRAS_MODELS = (Extras, StepCache, Offload, LayerwiseCasting, Compile, Quantization)
