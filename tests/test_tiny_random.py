"""The tiny pipelines: every one runs, the same for a seed, and no prompt is lost in a template."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from dit_accel.errors import ConfigError
from dit_accel.samples.tiny_random import TINY, tiny_arguments, tiny_names, tiny_pipeline
from dit_accel.samples.tiny_random.text import byte_tokenizer, template_pieces


@pytest.mark.parametrize("name", tiny_names())
def test_every_pipeline_makes_an_output_of_the_size_asked_for(name):
    state = torch.get_rng_state()
    pipe = tiny_pipeline(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(pipe).__name__ == TINY[name].pipeline
    values = tiny_arguments(name, steps=1)
    out = np.asarray(pipe(**values)[0])
    assert out.ndim == (4 if TINY[name].is_image else 5)
    assert out.shape[-1] == 3
    assert out.shape[-3:-1] == (values.get("height", 24), values.get("width", 36))
    assert np.isfinite(out).all()
    assert out.std() > 0.01


def test_the_seed_decides_the_weights():
    first, second, other = (tiny_pipeline("flux1-dev", seed).transformer.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5"])
def test_the_template_is_cut_off_and_the_prompt_is_kept(name):
    embeds, *rest = tiny_pipeline(name).encode_prompt("a ball")
    mask = next(x for x in rest if x.shape == embeds.shape[:2])
    # Six bytes, and what the template adds after the prompt (bytes of its closing markers).
    closing = {"hunyuan-video": len("<|eot_id|>"), "hunyuan-video-1.5": len("<|im_end|>\n<|im_start|>assistant\n")}
    assert 6 < mask.sum() <= 6 + closing[name]


def test_template_pieces_are_as_many_as_asked_for_and_survive_the_tokenizer():
    text = "<|head|>\n\nsome words that repeat, as words that repeat do<|eot|>"
    pieces = template_pieces(text, 20)
    assert "".join(pieces) == text
    assert len(pieces) == 20
    assert pieces[0] == "<|head|>"
    tokenizer = byte_tokenizer("qwen", 64, (text, 20))
    assert len(tokenizer(text).input_ids) == 20
    assert len(tokenizer(text + "é").input_ids) == 22


def test_a_saved_pipeline_loads_again(tmp_path):
    pipe = tiny_pipeline("flux1-schnell")
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    one, two = (np.asarray(p(**tiny_arguments("flux1-schnell", steps=1))[0]) for p in (pipe, again))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"flux-dev.*did you mean .*'flux1-dev'"):
        tiny_pipeline("flux-dev")
