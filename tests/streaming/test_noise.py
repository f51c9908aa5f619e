"""The noise ladder and the noise source."""

from __future__ import annotations

import pytest
import torch

from dit_accel.pipelines.streaming.ladder import Ladder
from dit_accel.pipelines.streaming.noise import INITIAL, NoiseSource
from dit_accel.streaming import StreamSettings, stream_preset


def test_warped_timesteps_are_the_published_ones():
    assert Ladder.of(StreamSettings()).timesteps == pytest.approx((1000, 937.5, 833.333, 625), abs=1e-3)
    rolling = Ladder.of(stream_preset("rolling-forcing"))
    assert rolling.timesteps == pytest.approx((1000, 952.38, 882.35, 769.23, 555.56), abs=0.01)
    shift8 = Ladder.of(StreamSettings(shift=8.0))
    assert shift8.timesteps[1:] == pytest.approx((960, 888.889, 727.273), abs=1e-3)
    assert Ladder.of(stream_preset("causvid")).timesteps == (1000, 757, 522)


def test_velocity_gives_back_the_clean_sample():
    ladder = Ladder.of(StreamSettings())
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2)
    for step in range(len(ladder)):
        x = ladder.noisy(clean, noise, step)
        velocity = noise - clean
        torch.testing.assert_close(ladder.clean(x, velocity, step), clean)
        later = ladder.euler(x, velocity, step)
        expected = clean if step + 1 == len(ladder) else ladder.noisy(clean, noise, step + 1)
        torch.testing.assert_close(later, expected)


def test_noise_depends_on_seed_frame_and_step_alone():
    shape = (1, 2, 3, 4)
    source = NoiseSource(7, shape)
    whole = source.draw(range(9))
    parts = torch.cat([NoiseSource(7, shape).draw(range(a, b)) for a, b in ((0, 1), (1, 5), (5, 9))], 2)
    assert torch.equal(whole, parts)
    others = [NoiseSource(8, shape).draw(range(9)), source.draw(range(9), 0), source.draw(range(9), 1)]
    for other in others:
        assert not torch.isclose(whole, other).all(0).any()


def test_antiphase_noise_keeps_its_variance_and_alternates():
    rho, shape = 0.3, (1, 8, 32, 32)
    source = NoiseSource(0, shape, rho)
    noise = torch.cat([source.draw(range(a, a + 3)) for a in range(0, 60, 3)], 2)[0]
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert noise.transpose(0, 1).flatten(1).var(1) == pytest.approx(torch.ones(60), abs=0.1)
    centred = noise.transpose(0, 1).flatten(1)
    lag = [float((centred[i:] * centred[: 60 - i]).mean()) for i in (1, 2)]
    assert lag == pytest.approx([-rho, rho**2], abs=0.01)
    within = float((centred[0::3] * centred[1::3]).mean())
    across = float((centred[2:-1:3] * centred[3::3]).mean())
    assert within == pytest.approx(-rho, abs=0.02)
    assert across == pytest.approx(-rho, abs=0.02)
    channels = noise.transpose(0, 1)
    assert float((channels[:, 0] * channels[:, 1]).mean()) == pytest.approx(0, abs=0.02)
    assert torch.equal(NoiseSource(0, shape, rho).draw(range(60))[0], noise)


def test_antiphase_zero_is_white_and_resumes():
    shape = (1, 2, 4, 4)
    assert torch.equal(NoiseSource(3, shape, 0.0).draw(range(4)), NoiseSource(3, shape).draw(range(4), INITIAL))
    source, other = NoiseSource(3, shape, 0.5), NoiseSource(0, shape, 0.5)
    whole = NoiseSource(3, shape, 0.5).draw(range(6))
    source.draw(range(3))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.draw(range(3, 6)), whole[:, :, 3:])


def test_antiphase_noise_is_that_of_its_frame_however_it_is_drawn():
    shape = (1, 2, 4, 4)
    whole = NoiseSource(3, shape, 0.5).draw(range(12))
    source = NoiseSource(3, shape, 0.5)
    # The same frames once more after a pass that failed, and frames after others that were given.
    for frames in (range(4, 6), range(4, 6), range(6, 7), range(6, 7), range(9, 12), range(2), range(2, 4)):
        assert torch.equal(source.draw(frames), whole[:, :, frames.start : frames.stop])
    assert len(source.state_dict()["kept"]) == 2
