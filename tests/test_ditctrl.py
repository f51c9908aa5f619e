"""Several prompts in one video: clips, blending, and shared keys and values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.nn import functional as F

import dit_accel
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.pipelines.clip_layout import ClipLayout
from dit_accel.pipelines.ditctrl import MultiPromptCogVideoXPipeline
from dit_accel.pipelines.shared_keys import Control, Sharing, binary_map, subject_map
from dit_accel.samples.tiny_random.cogvideox import cogvideox15_5b, cogvideox_2b, cogvideox_5b

CLIPS = {"tile": 3, "overlap": 1, "transitions": 0}
SHORT = {"num_inference_steps": 2, "output_type": "latent", **CLIPS}


def build(maker):
    torch.manual_seed(0)
    pipe = MultiPromptCogVideoXPipeline(**maker().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return build(cogvideox_2b)


def generate(pipe, prompts, seed=0, **changes):
    return pipe.generate(prompts, generator=torch.Generator().manual_seed(seed), **{**SHORT, **changes})


@pytest.mark.parametrize(("overlap", "transitions", "clips", "frames"), [(6, 1, 5, 41), (9, 2, 7, 37)])
def test_layout_formulas(overlap, transitions, clips, frames):
    layout = ClipLayout(3, 13, overlap, transitions)
    assert (layout.clips, layout.frames) == (clips, frames)
    covered = [set(range(frames)[layout.clip(k)]) for k in range(clips)]
    assert set.union(*covered) == set(range(frames))
    assert all(len(a & b) == overlap for a, b in pairwise(covered))
    shares = [layout.mixture(k) for k in range(clips)]
    assert shares[0] == (0, 0.0)
    assert shares[-1] == (2, 0.0)
    assert [u for _, u in shares[: transitions + 2]] == pytest.approx(
        [*(i / (transitions + 1) for i in range(transitions + 1)), 0.0]
    )


def test_weights_and_wrong_layouts():
    for tile in (1, 4, 13):
        weights = ClipLayout(2, tile, 0).weights()
        torch.testing.assert_close(weights, weights.flip(0))
        assert (weights > 0).all()
        assert (weights <= 1).all()
    with pytest.raises(ConfigError, match="0 to 12 frames, got 13"):
        ClipLayout(2, 13, 13)
    with pytest.raises(ConfigError, match="at least one"):
        ClipLayout(0)


@pytest.mark.parametrize("maker", [cogvideox_2b, cogvideox_5b])
def test_a_denoiser_without_coupling_makes_the_video_frame_by_frame(maker, monkeypatch):
    pipe = build(maker)
    layout = ClipLayout(3, **CLIPS)

    def forward(hidden_states, encoder_hidden_states, timestep, **_):
        return (0.5 * hidden_states + 0.01 * timestep.view(-1, 1, 1, 1, 1).float(),)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    video = generate(pipe, ["a", "b", "c"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(video.shape, generator=generator) * pipe.scheduler.init_noise_sigma
    pipe.scheduler.set_timesteps(2)
    previous, times = None, pipe.scheduler.timesteps
    for step, t in enumerate(times):
        out = forward(x, None, t.expand(1))[0]
        if maker is cogvideox_5b:
            before = times[step - 1] if step else None
            x, previous = pipe.scheduler.step(out, previous, t, before, x, generator=generator, return_dict=False)
        else:
            x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
    assert video.shape[1] == layout.frames
    torch.testing.assert_close(video, x, atol=1e-5, rtol=1e-5)


def test_one_prompt_is_the_stock_pipeline(pipe):
    ours = generate(pipe, ["a red ball"])
    stock = pipe("a red ball", "", num_frames=9, num_inference_steps=2, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).frames  # fmt: skip
    assert torch.equal(ours, stock)


def test_processors_come_back_and_prompts_matter(pipe):
    before = [block.attn1.processor for block in pipe.transformer.transformer_blocks]
    first = generate(pipe, ["a", "b"])
    assert [block.attn1.processor for block in pipe.transformer.transformer_blocks] == before
    assert torch.equal(first, generate(pipe, ["a", "b"]))
    assert not torch.equal(first, generate(pipe, ["a", "c"]))


def test_a_prompt_changes_its_clips_and_their_neighbours_alone_in_one_step(pipe):
    layout = ClipLayout(4, **CLIPS)
    never = Sharing(steps=())
    runs = [generate(pipe, ["a", "b", "c", end], num_inference_steps=1, sharing=never) for end in ("d", "e")]
    changed = (runs[0] != runs[1]).amax((0, 2, 3, 4)).bool()
    inside = torch.zeros(layout.frames, dtype=torch.bool)
    inside[layout.clip(3)] = True
    assert torch.equal(changed, inside)


def test_sharing_acts_in_its_steps_and_layers(pipe):
    plain = generate(pipe, ["a", "b"], sharing=Sharing(steps=()))
    assert torch.equal(generate(pipe, ["a", "b"], sharing=Sharing(layers=(), steps=range(9))), plain)
    assert torch.equal(generate(pipe, ["a", "b"], sharing=Sharing(steps=(5,))), plain)
    shared = generate(pipe, ["a", "b"], sharing=Sharing(steps=(0,)))
    assert not torch.equal(shared, plain)
    # The first clip's own frames stand before the overlap, and never see the second clip.
    one = {"num_inference_steps": 1}
    a, b = (generate(pipe, ["a", "b"], sharing=Sharing(steps=s), **one) for s in ((), (0,)))
    assert torch.equal(a[:, :2], b[:, :2])
    assert not torch.equal(a[:, 3:], b[:, 3:])


def control(subject=(), layers=(0,), threshold=0.3):
    module = object()
    made = Control(Sharing(range(9), layers, subject, threshold), [module])
    made.begin(0, 5, 12)
    return made, module


def joint(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 5 + 36, 2, 8, generator=generator) for _ in range(3))


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def test_target_uses_the_keys_of_its_source_and_the_source_its_own():
    made, module = control()
    q, k, v = joint()
    out = made.attend(module, q, k, v, dense=lambda: None)
    rows = [0, 0, 2, 2]
    torch.testing.assert_close(out, dense(q, k[rows], v[rows]))
    k2, v2 = k.clone(), v.clone()
    k2[[1, 3]], v2[[1, 3]] = 9.0, -9.0
    assert torch.equal(made.attend(module, q, k2, v2, dense=lambda: None), out)


def test_masked_sharing_keeps_subject_and_background_apart():
    made, module = control(subject=(1, 3))
    q, k, v = joint()
    out = made.attend(module, q, k, v, dense=lambda: None)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
    maps = weights[:, :, 5:][..., [1, 3]].sum(-1).mean(1)
    torch.testing.assert_close(subject_map(q, k, 5, (1, 3)), maps)
    source, target = (binary_map(maps[row], 12, 0.3) for row in (2, 3))
    assert 0 < source.sum() < 36
    for row in (1, 3):
        kept = k[row - 1], v[row - 1]
        seen = target[:, None] == source[None]
        mask = torch.ones(41, 41, dtype=torch.bool)
        mask[5:, 5:] = seen
        expected = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q[row], *kept)), attn_mask=mask
        ).transpose(0, 1)
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[[0, 2]], dense(q, k, v)[[0, 2]])
    everything, module = control(subject=(1, 3), threshold=-1.0)
    torch.testing.assert_close(
        everything.attend(module, q, k, v, dense=lambda: None), dense(q, k[[0, 0, 2, 2]], v[[0, 0, 2, 2]])
    )


def test_maps_are_averaged_over_layers_and_forgotten_after_a_pass():
    made, module = control(subject=(0,), layers=())
    q, k, v = joint()
    for seed in (1, 2):
        q, k, v = joint(seed)
        made.attend(module, q, k, v, dense=lambda: None)
    assert len(made._maps) == 2
    made.begin(1, 5, 12)
    assert made._maps == []


def test_a_subject_changes_the_video_and_constant_maps_do_no_harm(pipe):
    shared = generate(pipe, ["a", "b"], sharing=Sharing(steps=range(9), layers=(1,)))
    told = {(x.layer, x.reason, x.density) for x in pipe.report.calls}
    assert told == {(0, "layer 0 shares no keys", 1.0), (1, "dense attention to the keys of the clip before", 1.0)}
    masked = generate(pipe, ["a", "b"], sharing=Sharing(steps=range(9), layers=(1,), subject=(0,)))
    chosen = [x for x in pipe.report.calls if x.reason is None]
    assert {x.layer for x in chosen} == {1}
    assert all(1 < x.density < 1.5 and x.milliseconds("select") > 0 for x in chosen)
    assert masked.isfinite().all()
    assert not torch.equal(masked, shared)
    assert not binary_map(torch.ones(24), 12, 0.3).any()


def test_models_that_it_is_not_for_are_refused():
    with pytest.raises(UnsupportedError, match=r"CogVideoX 1.0"):
        generate(build(cogvideox15_5b), ["a", "b"])
    with pytest.raises(UnsupportedError, match="guidance > 1"):
        generate(build(cogvideox_2b), ["a", "b"], guidance_scale=1.0)


@pytest.mark.parametrize(
    ("prompts", "wanted", "transitions", "frames"), [(2, 41, 1, 45), (2, 13, 1, 21), (3, 37, 2, 37), (1, 30, 2, 37)]
)
def test_a_length_is_covered_by_prompts_that_hold_about_as_long(prompts, wanted, transitions, frames):
    layout, order = ClipLayout.covering(prompts, wanted)
    assert order == sorted(order)
    counts = [order.count(index) for index in range(prompts)]
    assert max(counts) - min(counts) <= 1
    assert len(order) == layout.prompts
    assert wanted <= layout.frames
    # No layout with as many transitions and one prompt fewer would do.
    assert layout.prompts == prompts or ClipLayout(layout.prompts - 1, transitions=layout.transitions).frames < wanted
    assert (layout.transitions, layout.frames) == (transitions, frames)


def test_sharing_with_a_source_that_is_the_target_changes_nothing():
    made, module = control()
    q, k, v = (x[[0, 0, 2, 2]] for x in joint())
    out = made.attend(module, q, k, v, dense=lambda: None)
    torch.testing.assert_close(out, dense(q, k, v))


def test_transitions_mix_the_embeddings_of_both_prompts(pipe):
    layout = ClipLayout(2, 13, 9, 3)
    texts = [words for _, words in pipe._texts(["a", "b"], "", layout)]
    assert len(texts) == 5
    for index, words in enumerate(texts):
        torch.testing.assert_close(words, torch.lerp(texts[0], texts[-1], index / 4))
    same = [words for _, words in pipe._texts(["a", "a"], "", layout)]
    assert all(torch.equal(words, same[0]) for words in same)


def test_every_pair_of_clips_has_a_context_of_its_own(pipe):
    """So that what step caches and methods remember of one pair is not used for another."""
    seen = []
    with dit_accel.accelerate(pipe) as acceleration:
        engine = acceleration.engines["transformer"]
        watch = pipe.transformer.register_forward_hook(lambda *_: seen.append(engine.state))
        for _ in range(2):
            generate(pipe, ["a", "b", "c", "d"])
        watch.remove()
    pairs = [(step, f"clips {pair}") for step in range(2) for pair in range(3)]
    assert [(state.step, state.branch) for state in seen] == pairs * 2
    assert [state.generation for state in seen] == [0] * 6 + [1] * 6


def test_a_step_cache_computes_the_first_step_of_every_pair(pipe):
    computed, last = [], pipe.transformer.transformer_blocks[-1]
    watch = last.ff.register_forward_pre_hook(lambda *_: computed.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    try:
        generate(pipe, ["a", "b", "c", "d"])
    finally:
        pipe.transformer.disable_cache()
        watch.remove()
    assert len(computed) == 3
