"""Pictures of methods and head tables: what they show is what is computed."""

from __future__ import annotations

import pytest
import torch

from dit_accel.cli import main
from dit_accel.cli.methods import parse_parameters
from dit_accel.errors import ConfigError
from dit_accel.head_table import HeadTable
from dit_accel.layout import TokenLayout, parse_grid
from dit_accel.methods.registry import get_method
from dit_accel.pictures import draw, draw_table, picture_of, picture_of_layer

LAYOUTS = [TokenLayout((4, 5, 7)), TokenLayout((4, 5, 7), 9, "before")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("neighborhood", {"window": (2, 3, 3), "tile": (2, 2, 2)}),
        ("sliding_tile", {"window": (1, 3, 1), "tile": (2, 2, 2)}),
        ("sparse_vdit", {"mode": "multi_diagonal", "block": 8}),
        ("a_shape", {"n_init": 3, "n_local": 20, "block": 8}),
        ("svg", {"block": 8}),
    ],
)
def test_a_picture_is_the_plan(layout, name, parameters):
    method, query = get_method(name, **parameters), 77
    picture = picture_of(method, layout, query)
    order, plan = method.plan(layout, *picture_tensors(layout))
    for head, density in enumerate(picture.density):
        tokens = torch.arange(layout.tokens)
        if order is not None:
            tokens = order.query if order.query.ndim == 1 else order.query[0, head]
        raster = torch.empty(2, layout.tokens, layout.tokens)
        exact = plan.to_token_mask()[0, min(head, plan.indices.shape[1] - 1)]
        owner = plan.q_blocks.block_of_token()
        blocks = plan.to_mask()[0, min(head, plan.indices.shape[1] - 1)][owner.unsqueeze(-1), owner]
        raster[:, tokens.unsqueeze(-1), tokens] = torch.stack([exact, blocks]).float()
        raster = raster[:, layout.video_slice(), layout.video_slice()]
        assert torch.equal(picture.seen[head].flatten(), raster[0, query].bool())
        torch.testing.assert_close(picture.plane[head], raster[1].double())  # 35 bins of a frame of 35 tokens
        assert density == pytest.approx(plan.density_per_head().flatten()[min(head, plan.indices.shape[1] - 1)].item())


def picture_tensors(layout):
    from dit_accel.pictures import smooth_tensors

    return smooth_tensors(layout, 2)


def test_coarse_bins_average_whole_frames():
    picture = picture_of(get_method("sink_recent", recent_frames=1), TokenLayout((6, 20, 30)))
    assert picture.plane.shape == (1, 240, 240)
    per_frame = picture.plane[0].view(6, 40, 6, 40).mean((1, 3))
    expected = torch.eye(6, dtype=torch.float64)
    expected[:, 0] = 1
    torch.testing.assert_close(per_frame, expected)


def test_pictures_are_images(tmp_path):
    path = tmp_path / "svg.png"
    draw(picture_of(get_method("svg", block=8), TokenLayout((3, 4, 5))), path)
    table = HeadTable.make({"modes": {"a": {"method": "dense"}, "b": {"method": "skip"}}, "heads": [["a", "b"]]})
    draw_table(table, tmp_path / "table.png")
    for file in (path, tmp_path / "table.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_layer_of_a_table_has_a_row_per_mode():
    layout, base = TokenLayout((4, 5, 7)), get_method("sink_recent", recent_frames=1, block=8)
    near = {"method": "sliding_tile", "parameters": {"window": [1, 1, 1], "tile": [2, 2, 2]}}
    modes = {"near": near, "mine": {}, "none": {"method": "skip"}, "full": {"method": "dense"}}
    table = HeadTable.make({"modes": modes, "heads": [["full"] * 5, ["near", "none", "mine", "near", "full"]]})
    picture = picture_of_layer(table, 1, base, layout, 77)
    assert [label.split(":")[0] for label in picture.labels] == ["heads 0, 3", "heads 1", "heads 2", "heads 4"]
    for row, method in ((0, get_method("sliding_tile", window=(1, 1, 1), tile=(2, 2, 2))), (2, base)):
        alone = picture_of(method, layout, 77)
        assert torch.equal(picture.seen[row], alone.seen[0])
        assert torch.equal(picture.plane[row], alone.plane[0])
        assert picture.density[row] == alone.density[0]
    assert not picture.seen[1].any()
    assert picture.density[1] == 0
    assert picture.seen[3].all()
    with pytest.raises(ConfigError, match=r"layer: .*\[0, 2\)"):
        picture_of_layer(table, 2, base, layout)


def test_the_command_line_draws(tmp_path, monkeypatch, capsys):
    target, table = tmp_path / "mask.png", tmp_path / "table.yaml"
    HeadTable.make({"modes": {"near": {"method": "dense"}}, "heads": [["near"]]}).save(table)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["dit-accel", "methods", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main.main()
        return left.value.code or 0, "".join(capsys.readouterr())

    code, said = run("show", "grat", "--grid", "4x6x6", "--output", target, "-p", "tile=[2, 2, 2]", "-p", "ring=true")
    assert code == 0
    assert "density" in said
    assert target.stat().st_size > 1000
    target.unlink()
    assert run("show", "grat", "--grid", "4x6x6", "--head-table", table, "--output", target)[0] == 0
    assert target.stat().st_size > 1000
    assert run("show", "grat", "--grid", "4x6x6", "--head-table", table, "--layer", 1)[0] == 2
    assert run("show", "grat", "--head-table", table)[0] == 2
    assert run("table", table)[1].splitlines()[0].split() == ["0", "0"]
    assert run("show", "grat", "--grid", "4by6")[0] == 2
    assert run("show", "grat", "--output", target)[0] == 2
    assert "tile" in run("show", "grat", "-p", "tile=3")[1]


def test_grids_and_parameters():
    assert parse_grid("21x30x52") == (21, 30, 52)
    assert parse_grid("64X48") == (1, 64, 48)
    assert parse_parameters(["window=[3, 3, 3]", "density=0.3", "mode=stripe"]) == {
        "window": [3, 3, 3], "density": 0.3, "mode": "stripe",
    }  # fmt: skip
    for wrong in ("0x3x3", "3", "axbxc"):
        with pytest.raises(ConfigError, match="grid: expected"):
            parse_grid(wrong)
    for pair in ("density", "=3", "a=[3"):
        with pytest.raises(ConfigError, match="--parameter"):
            parse_parameters([pair])
    with pytest.raises(ConfigError, match="expected a video token"):
        picture_of(get_method("grat"), TokenLayout((1, 2, 2)), 4)
