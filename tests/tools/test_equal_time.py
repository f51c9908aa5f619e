"""Candidates of different speed compared at equal time."""

from __future__ import annotations

from dit_accel.compare.equal_time import at_equal_time, equal_time_table


def rows(**figures):
    """One row per candidate and prompt; `name=(ratio, psnr of each prompt)`."""
    return [
        {"candidate": name, "prompt": "p", "seed": seed, "ratio": ratio, "psnr": psnr}
        for name, (ratio, *each) in figures.items()
        for seed, psnr in enumerate(each)
    ]


LINE = {"slow": (1.0, 40.0, 42.0), "fast": (2.0, 30.0, 36.0)}


def test_between_two_presets_the_line_is_interpolated_prompt_by_prompt():
    (found,) = at_equal_time(rows(**LINE, other=(1.5, 34.0, 41.0)), ["fast", "slow"], ["other"])
    assert (found.ratio, found.psnr, found.line_psnr) == (1.5, 37.5, 37.0)
    assert (found.gain, found.wins, found.prompts) == (-0.5, 1, 2)  # 35 - 34 and 39 - 41


def test_a_slower_candidate_meets_the_slowest_preset_and_a_faster_one_none():
    slower, faster = at_equal_time(
        rows(**LINE, slower=(0.5, 39.0, 40.0), faster=(2.5, 20.0, 20.0)), ["slow", "fast"], ["slower", "faster"]
    )
    assert (slower.line_psnr, slower.gain, slower.wins) == (41.0, 1.5, 2)
    assert (faster.line_psnr, faster.gain, faster.wins) == (None, None, 0)


def test_rows_are_paired_by_prompt_whatever_their_order():
    made = rows(**LINE, other=(2.0, 29.0, 35.0))
    (found,) = at_equal_time(made[::-1], ["slow", "fast"], ["other"])
    assert (found.gain, found.wins) == (1.0, 2)


def test_the_verdict_counts_wins_and_names_losses_and_what_was_not_compared():
    made = rows(**LINE, worse=(1.0, 30.0, 30.0), better=(1.0, 50.0, 50.0), faster=(3.0, 9.0, 9.0))
    found = at_equal_time(made, ["slow", "fast"], ["worse", "better", "faster"])
    text = equal_time_table(found, "calibrated")
    assert "closer to dense than 1 of 2 uniform presets; not closer than better" in text
    assert "faster than every calibrated preset: faster." in text
    assert "| worse | 1.00x | 30.00 | 41.00 | +11.00 dB | 2 of 2 |" in text


def test_a_preset_that_the_line_holds_is_neither_won_nor_lost():
    made = rows(**LINE, same=(2.1, 30.0, 36.0), worse=(1.0, 30.0, 30.0))
    found = at_equal_time(made, ["slow", "fast"], ["same", "worse"])
    assert [row.is_same for row in found] == [True, False]
    text = equal_time_table(found, "calibrated")
    assert "| same | 2.10x | 33.00 | the same preset |  |  |" in text
    assert "than 1 of 1 uniform presets; the same as one of them: same." in text
