"""Decoding in pieces equals decoding at once."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional as F

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.streaming.decoder import ContextDecoder, LatentScale, StreamingVaeDecoder
from dit_accel.samples.tiny_random import RANDOM_SIZES
from dit_accel.samples.tiny_wan_model import make_vae

FRAMES = 7


def wan21_vae():
    """The layout of Wan 2.1: two temporal up-samplings and no patch."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0],
    )  # fmt: skip


@pytest.fixture(scope="module", params=["wan2.1", "residual"])
def vae(request):
    torch.manual_seed(0)
    return (wan21_vae() if request.param == "wan2.1" else make_vae(RANDOM_SIZES)).eval()


def one_shot(vae, latents):
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return vae.decode(latents * std + mean, return_dict=False)[0]


def draw(seed=0, frames=FRAMES):
    return torch.randn(1, 4, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 3, 1], [1, 2, 4], [2, 5]])
@pytest.mark.parametrize("together", [1, 3])
def test_any_cutting_gives_the_frames_of_one_call(vae, cuts, together):
    latents, decoder = draw(), StreamingVaeDecoder(vae, together)
    frames = torch.cat([decoder.decode(part) for part in latents.split(cuts, dim=2)], dim=2)
    assert frames.shape[2] == 1 + vae.config.scale_factor_temporal * (FRAMES - 1)
    torch.testing.assert_close(frames, one_shot(vae, latents), atol=1e-5, rtol=0)


def test_interleaved_streams_and_one_shot_calls_do_not_mix(vae):
    videos, decoders = [draw(0), draw(1)], [StreamingVaeDecoder(vae), StreamingVaeDecoder(vae)]
    parts = [[], []]
    for start in range(0, FRAMES, 2):
        for i in (0, 1):
            parts[i].append(decoders[i].decode(videos[i][:, :, start : start + 2]))
        one_shot(vae, draw(2, 2))
    for i in (0, 1):
        torch.testing.assert_close(torch.cat(parts[i], 2), one_shot(vae, videos[i]), atol=1e-5, rtol=0)


def test_state_round_trip(vae):
    latents, decoder, other = draw(), StreamingVaeDecoder(vae), StreamingVaeDecoder(vae)
    for taken in (1, 3):
        decoder.load_state_dict({"states": None})
        decoder.decode(latents[:, :, :taken])
        other.load_state_dict(decoder.state_dict())
        rest = latents[:, :, taken:]
        assert torch.equal(other.decode(rest), decoder.decode(rest))


def test_a_call_that_fails_half_way_ends_the_stream_until_a_state_is_loaded(vae):
    latents, decoder = draw(), StreamingVaeDecoder(vae)
    first = decoder.decode(latents[:, :, :3])
    state = decoder.state_dict()
    hook = vae.decoder.conv_out.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(latents[:, :, 3:])
    hook.remove()
    for call in (lambda: decoder.decode(latents[:, :, 3:]), decoder.state_dict):
        with pytest.raises(UnsupportedError, match="failed half way"):
            call()
    decoder.load_state_dict(state)
    frames = torch.cat([first, decoder.decode(latents[:, :, 3:])], 2)
    torch.testing.assert_close(frames, one_shot(vae, latents), atol=1e-5, rtol=0)


def test_state_does_not_grow(vae):
    decoder, sizes = StreamingVaeDecoder(vae), []
    for _ in range(6):
        decoder.decode(draw(frames=2))
        sizes.append(sum(x.numel() for x in decoder.state_dict()["states"] if isinstance(x, torch.Tensor)))
    assert sizes[1:] == sizes[1:2] * 5


def test_scale_round_trip(vae):
    scale, latents = LatentScale(vae), draw()
    torch.testing.assert_close(scale.from_vae(scale.to_vae(latents)), latents)


@pytest.mark.parametrize("cuts", [[7], [3, 3, 1], [1] * 7])
def test_context_decoder_equals_one_call_of_a_function_with_short_memory(cuts):
    def function(z):
        memory = sum(F.pad(z, (0, 0, 0, 0, shift, 0))[:, :, : z.shape[2]] * (shift + 1) for shift in range(4))
        return memory.repeat_interleave(4, dim=2)[:, :3, 3:]

    latents, decoder = draw(), ContextDecoder(function, 4)
    # The frames of the first latent of a call are cut, so the function must be given its past to be right there.
    frames = torch.cat([decoder.decode(part) for part in latents.split(cuts, dim=2)], dim=2)
    torch.testing.assert_close(frames, function(latents))
    other = ContextDecoder(function, 4)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other.decode(latents[:, :, :2]), decoder.decode(latents[:, :, :2]))


def test_other_autoencoders_are_refused():
    with pytest.raises(UnsupportedError, match="got Linear"):
        StreamingVaeDecoder(torch.nn.Linear(1, 1))
