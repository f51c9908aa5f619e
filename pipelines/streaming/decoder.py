"""Latents to pixels chunk by chunk, with no seam: the causal convolutions keep their inputs between chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_accel.errors import UnsupportedError


class LatentDecoder(Protocol):
    """What turns the latents of a stream into frames; one instance serves one stream."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, C, F, h, w]` that follow the last ones, to frames `[B, 3, T, H, W]` in [-1, 1]."""

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`."""


class LatentScale:
    """The normalisation of a Wan autoencoder: what the transformer sees is (z - mean) / std.

    Args:
        vae: an `AutoencoderKLWan`.
    """

    def __init__(self, vae: Any) -> None:
        self.mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Normalised latents to those of the autoencoder, in their dtype."""
        return latents * self.std.to(latents) + self.mean.to(latents)

    def from_vae(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder to normalised ones."""
        return (z - self.mean.to(z)) / self.std.to(z)


class StreamingVaeDecoder:
    """`AutoencoderKLWan.decode` in pieces: any cutting of the latents gives the frames of one call.

    The first latent gives 1 frame, every later one `scale_factor_temporal` frames. The state is here and not in the
    autoencoder, so that streams do not mix and one-shot calls in between do no harm.

    Args:
        vae: an `AutoencoderKLWan`; its `use_tiling` is not obeyed, since tiles would need a state each.
        latents_per_call: latents decoded together: more is faster on a GPU and takes more memory. Default 1.

    Raises:
        UnsupportedError: another class of autoencoder.
    """

    def __init__(self, vae: Any, latents_per_call: int = 1) -> None:
        if type(vae).__name__ != "AutoencoderKLWan":
            raise UnsupportedError(f"streaming decode: expected an AutoencoderKLWan, got {type(vae).__name__}")
        self.vae, self.latents_per_call = vae, latents_per_call
        self._scale = LatentScale(vae)
        self._states: list[Any] | None = None
        self._is_torn = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, C, F, h, w]` to frames `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            UnsupportedError: a call before failed half way, and no state has been loaded since.
        """
        self._check_whole()
        z = self._scale.to_vae(latents.to(self.vae.dtype))
        z = self.vae.post_quant_conv(z)
        # The states change layer by layer; keeping the old ones as well would double their memory.
        self._is_torn = True
        pieces = self._pieces(z)
        self._is_torn = False
        frames = torch.cat(pieces, dim=2)
        if self.vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            frames = unpatchify(frames, patch_size=self.vae.config.patch_size)
        return frames.clamp(-1.0, 1.0)

    def _check_whole(self) -> None:
        if self._is_torn:
            raise UnsupportedError(
                "streaming decode: a call failed half way through the autoencoder, whose states are of two chunks now; "
                "load a state that was saved before it, or begin a new stream"
            )

    def _pieces(self, z: Tensor) -> list[Tensor]:
        """Frames of latents of the autoencoder, call by call."""
        pieces = []
        if self._states is None:
            self._states = [None] * self.vae._cached_conv_counts["decoder"]
            pieces.append(self.vae.decoder(z[:, :, :1], feat_cache=self._states, feat_idx=[0], first_chunk=True))
            z = z[:, :, 1:]
        for part in z.split(self.latents_per_call, dim=2) if z.shape[2] else ():
            pieces.append(self.vae.decoder(part, feat_cache=self._states, feat_idx=[0]))
        return pieces

    def state_dict(self) -> dict[str, Any]:
        """States of the convolutions: a tensor, None, or the mark of an up-sampler that has seen one frame.

        Raises:
            UnsupportedError: as `decode`.
        """
        self._check_whole()
        return {"states": None if self._states is None else [_copy(x) for x in self._states]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`."""
        states, self._is_torn = state["states"], False
        self._states = None if states is None else [_copy(x) for x in states]


class ContextDecoder:
    """A decoder without state that is given the last latents again, as small distilled decoders are used.

    Args:
        function: latents `[B, C, F, h, w]` to frames `[B, 3, 1 + factor * (F - 1), H, W]`; a frame may depend on
            `context` latents before its own.
        factor: frames per latent.
        context: latents that are repeated. Default 3, as for TAEHV.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], factor: int, context: int = 3) -> None:
        self.function, self.factor, self.context = function, factor, context
        self._last: Tensor | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, F, h, w]` to the frames that are new."""
        joined = latents if self._last is None else torch.cat([self._last, latents], dim=2)
        frames = self.function(joined)
        self._last = joined[:, :, -self.context :].clone()
        return frames[:, :, frames.shape[2] - self._new(latents.shape[2], joined.shape[2]) :]

    def _new(self, latents: int, joined: int) -> int:
        return self.factor * latents if joined > latents else 1 + self.factor * (latents - 1)

    def state_dict(self) -> dict[str, Any]:
        """The repeated latents."""
        return {"last": _copy(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`."""
        self._last = _copy(state["last"])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
