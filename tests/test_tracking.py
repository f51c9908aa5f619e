"""Step, noise level, branch and generation, read from cache contexts or from the timestep alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from test_accelerate import inputs, run, tiny_transformer

from dit_accel.families.registry import family_of
from dit_accel.families.tracking import HOOK_NAME, track, untrack


def tracked():
    model, states = tiny_transformer(), []
    track(model, family_of(model), states.append)
    return model, states


def at(timestep: float, batch: int = 1) -> dict[str, torch.Tensor]:
    return inputs(batch) | {"timestep": torch.full((batch,), timestep)}


def test_the_cache_context_gives_step_noise_and_branch():
    model, states = tracked()
    for step, sigma in enumerate((1.0, 0.7)):
        for branch in ("cond", "uncond"):
            with model.cache_context(branch, step_index=step, sigma=sigma, num_inference_steps=2):
                run(model, **at(1000 * sigma))
    assert [(s.step, s.noise, s.branch, s.steps, s.generation) for s in states] == [
        (0, 1.0, "cond", 2, 0),
        (0, 1.0, "uncond", 2, 0),
        (1, 0.7, "cond", 2, 0),
        (1, 0.7, "uncond", 2, 0),
    ]
    assert states[0].grid == (3, 6, 5)


def test_a_repeated_branch_at_step_0_is_a_new_generation():
    model, states = tracked()
    for _ in range(2):
        with model.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=1):
            run(model, **at(1000))
    assert [s.generation for s in states] == [0, 1]


def test_the_second_expert_begins_in_the_middle_of_a_run():
    model, states = tracked()
    for _ in range(2):
        for step in (5, 6):
            with model.cache_context("cond", step_index=step, sigma=0.5, num_inference_steps=8):
                run(model, **at(500))
    assert [(s.step, s.generation) for s in states] == [(5, 0), (6, 0), (5, 1), (6, 1)]


def test_timesteps_alone_give_steps_branches_and_generations():
    model, states = tracked()
    for _ in range(2):
        for timestep in (900.0, 900.0, 400.0, 400.0):
            run(model, **at(timestep))
    got = [(s.step, s.branch, s.generation) for s in states]
    once = [(0, "default"), (0, "second"), (1, "default"), (1, "second")]
    assert got == [(*pair, generation) for generation in (0, 1) for pair in once]
    assert states[0].noise == 0.9


def test_a_named_context_without_a_step_counts_steps_from_timesteps():
    model, states = tracked()
    for timestep in (900.0, 400.0):
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                run(model, **at(timestep))
    assert [(s.step, s.branch) for s in states] == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]


def test_named_branches_of_different_batch_share_their_steps():
    """LTX-2 runs both kinds of guidance as one batch, and then further branches of half that size."""
    model, states = tracked()
    for timestep in (900.0, 400.0):
        for branch, batch in (("cond_uncond", 2), ("uncond_stg", 1), ("uncond_modality", 1)):
            with model.cache_context(branch):
                run(model, **at(timestep, batch))
    assert [(s.step, s.batch) for s in states] == [(0, 2), (0, 1), (0, 1), (1, 2), (1, 1), (1, 1)]
    assert {s.generation for s in states} == {0}


def test_both_halves_of_a_heun_step_belong_to_one_generation():
    """Heun's scheduler gives every timestep but the first twice, and so to each branch."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    model, states = tracked()
    for timestep in scheduler.timesteps.tolist():
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                run(model, **at(timestep))
    assert [(s.step, s.branch) for s in states] == [(step, b) for step in range(5) for b in ("cond", "uncond")]
    assert {s.generation for s in states} == {0}


def test_timesteps_alone_tell_guided_heun_steps_apart():
    model, states = tracked()
    for timestep in (900.0, 900.0, *[400.0] * 4):
        run(model, **at(timestep))
    assert [(s.step, s.branch) for s in states] == [(step, b) for step in range(3) for b in ("default", "second")]
    assert {s.generation for s in states} == {0}


@pytest.mark.parametrize("says_step", [True, False])
def test_the_second_expert_forgets_a_run_that_was_interrupted(says_step: bool):
    """Its first step of the next run may be later than, or the same as, the one at which it was left."""
    pair = tracked(), tracked()
    hooks = [model._diffusers_hook.hooks[HOOK_NAME] for model, _ in pair]
    for hook, other in (hooks, hooks[::-1]):
        hook.siblings = [other]

    def step(expert: int, index: int, timestep: float) -> None:
        model = pair[expert][0]
        place = {"step_index": index, "sigma": timestep / 1000, "num_inference_steps": 9} if says_step else {}
        with model.cache_context("cond", **place):
            run(model, **at(timestep))

    step(0, 0, 1000.0)
    step(1, 1, 500.0)  # interrupted here
    for index, timestep in enumerate((1000.0, 900.0)):
        step(0, index, timestep)
    step(1, 2, 500.0)
    assert [(s.step, s.generation) for s in pair[0][1]] == [(0, 0), (0, 1), (1, 1)]
    assert [(s.step, s.generation) for s in pair[1][1]] == [(1, 0), (2, 1)]


def test_another_shape_or_batch_is_a_new_generation():
    model, states = tracked()
    run(model, **at(900))
    run(model, **at(800, batch=2))
    wide = at(700, batch=2)
    run(model, **(wide | {"hidden_states": torch.zeros(2, 4, 3, 6, 6)}))
    assert [s.generation for s in states] == [0, 1, 2]
    assert [s.step for s in states] == [0, 0, 0]


def test_the_end_of_a_pipeline_call_resets_the_count():
    model, states = tracked()
    run(model, **at(500))
    model._reset_stateful_cache()
    run(model, **at(400))
    assert [(s.step, s.generation) for s in states] == [(0, 0), (0, 1)]


def test_untrack_leaves_no_hook():
    model, states = tracked()
    untrack(model)
    run(model, **at(500))
    assert not states
    assert not model._diffusers_hook.hooks
