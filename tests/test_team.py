"""Processes that train together: they start alike, step alike, and draw apart."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dit_accel.samples.team import Team, run_team


def take_a_step(team: Team) -> dict[str, list[torch.Tensor]]:
    """What each process has after a step in which only the first uses the second layer and nobody the third."""
    torch.manual_seed(7 + team.apart)
    layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
    team.start_alike([layers])
    batch = torch.randn(team.part(5), 3)
    loss = layers[0](batch).sum() + (layers[1](batch).sum() if team.leads else 0.0)
    loss.backward()
    own = layers[0].weight.grad.clone()
    team.average_gradients(list(layers.parameters()))
    assert layers[2].weight.grad is None
    (agreed,) = team.agree(float(team.rank + 3))
    told = {"batch": batch, "own": own, "start": layers[0].weight.detach(), "agreed": torch.tensor(agreed)}
    told |= {"first": layers[0].weight.grad, "second": layers[1].weight.grad}
    gathered = {}
    for name, value in told.items():
        gathered[name] = [torch.empty_like(value) for _ in range(team.size)]
        dist.all_gather(gathered[name], value.contiguous())
    return gathered


def fail_in_the_second(team: Team) -> None:
    if not team.leads:
        raise ValueError("the second has had enough")
    dist.barrier()


def fail_in_the_first(team: Team) -> None:
    if team.leads:
        raise RuntimeError("the first has had enough")
    dist.barrier()


class Unread:
    """What cannot be unpickled, so that no other process ever comes."""

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("no number",)

    def __call__(self, team: Team) -> None:
        """Is not reached."""


def test_two_processes_start_and_step_alike_and_draw_apart():
    found = run_team(2, take_a_step)
    for name in ("start", "first", "second", "agreed"):
        assert torch.equal(*found[name]), name
    assert found["batch"][0].shape == (2, 3)
    assert not torch.equal(*found["batch"])
    torch.testing.assert_close(found["first"][0], torch.stack(found["own"]).mean(0))
    assert found["second"][0].abs().sum() > 0
    assert found["agreed"][0] == 3


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (fail_in_the_second, "the second has had enough"),
        (fail_in_the_first, "^the first has had enough"),
        (Unread(), "invalid literal for int"),
    ],
)
def test_what_breaks_a_process_is_told(call, told):
    with pytest.raises(Exception, match=told):
        run_team(2, call)


def test_one_process_talks_to_nobody():
    assert run_team(1, lambda team: (team.leads, team.part(3), team.apart, team.agree(2.0))) == (True, 3, 0, (2.0,))
