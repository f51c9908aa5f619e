"""Output files: checked first, complete or absent, playable."""

from __future__ import annotations

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from dit_accel.cli.files import report_path
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.video.files import OutputFile, check_frames
from dit_accel.video.growing import StreamingVideoFile


def clip(frames=5, height=48, width=64):
    ramp = np.linspace(0, 1, frames)[:, None, None, None]
    return np.broadcast_to(ramp, (frames, height, width, 3)).copy()


@pytest.mark.parametrize("height", [48, 47])
def test_mp4_holds_all_frames_in_a_format_players_open(tmp_path, height):
    path = tmp_path / "new" / "clip.mp4"
    with OutputFile(path) as file:
        file.write(clip(height=height), fps=8)
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
    frames = imageio.mimread(path)
    assert meta["codec"] == "h264"
    assert "yuv420p" in meta["pix_fmt"]
    assert meta["fps"] == 8
    assert len(frames) == 5
    assert frames[0].mean() < 20
    assert frames[-1].mean() > 235
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    assert list(path.parent.iterdir()) == [path]


def test_gif_and_png(tmp_path):
    for name, count in (("a.gif", 5), ("a.png", 1)):
        with OutputFile(tmp_path / name) as file:
            file.write(clip(), fps=10)
        assert len(imageio.mimread(tmp_path / name)) == count


def test_a_failure_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), OutputFile(path):
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_have_its_name_stays_beside_it(tmp_path, monkeypatch):
    """On Windows a player that has the old file open keeps it from being replaced."""
    path = tmp_path / "clip.gif"
    path.write_text("old")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UnsupportedError, match="cannot be replaced") as told, OutputFile(path) as file:
        file.write(clip(), fps=10)
    assert path.read_text() == "old"
    assert len(imageio.mimread(str(told.value).rsplit(" ", 1)[1])) == 5


def test_home_is_where_the_shell_says_it_is(tmp_path, monkeypatch):
    """A shell leaves the tilde of --output=~/clip.mp4 as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with OutputFile("~/clip.gif") as file:
        file.write(clip(), fps=10)
    assert report_path(None, Path("~/clip.gif")) == tmp_path / "clip.json"
    assert (tmp_path / "clip.gif").is_file()


def test_frames_that_would_be_black_are_refused():
    broken = clip()
    check_frames(broken)
    broken[2, 3, 4] = np.nan
    with pytest.raises(UnsupportedError, match="frames hold NaN"):
        check_frames(broken)


@pytest.mark.parametrize("kind", [OutputFile, lambda path: StreamingVideoFile(path, 8)])
def test_a_missing_ffmpeg_is_noticed_first(tmp_path, monkeypatch, kind):
    def find():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", find)
    with pytest.raises(ConfigError, match=r"no ffmpeg for \.mp4"):
        kind(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"), [("clip.avi", "ends in .mp4"), ("clip", "ends in .mp4"), ("folder.mp4", "is a directory")]
)
def test_bad_names_are_refused_before_anything_runs(tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ConfigError, match=message):
        OutputFile(tmp_path / name)


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write in"):
        OutputFile(tmp_path / "file" / "clip.mp4")
