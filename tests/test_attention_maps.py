"""Kinds of heads: heads made to be of a kind are found to be it, and the page says what was measured."""

from __future__ import annotations

import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.samples.attention_maps import KINDS, classify, examples, excess_mass, query_picture, regions, write
from dit_accel.samples.captured_attention import Call

LAYOUT = TokenLayout((7, 8, 8))
AT = LAYOUT.coordinates.float()


def near(places, sharpness):
    """Queries and keys whose logits are -sharpness * squared distance of `places` `[N, p]`, up to a term per query."""
    square = places.square().sum(-1, keepdim=True)
    unused = torch.zeros(len(places), 8 - places.shape[1] - 1)
    q = torch.cat([2 * sharpness * places, torch.ones_like(square), unused], -1)
    k = torch.cat([places, -sharpness * square, unused], -1)
    return q * 8**0.5, k


def heads():
    """One head of each kind, in the order of `KINDS`."""
    sink = torch.zeros(len(AT), 8), torch.zeros(len(AT), 8)
    sink[0][:, 0], sink[1][[17, 300], 0] = 8**0.5, 8.0
    uniform = torch.zeros(len(AT), 8), torch.zeros(len(AT), 8)
    made = [near(AT, 2.0), near(AT[:, 1:], 2.0), sink, uniform]
    q, k = (torch.stack(x)[None] for x in zip(*made, strict=True))
    return Call("made", 0, 1, LAYOUT, (q, k, k))


def test_heads_made_to_be_of_a_kind_are_found_to_be_it():
    found = classify([heads()])
    assert [head.kind for head in found.values()] == list(KINDS)
    assert found[0, 0].excess["local"] > 0.75
    assert found[0, 1].excess["temporal"] > 0.4
    assert found[0, 2].excess["sink"] > 0.8
    assert found[0, 3].spread == pytest.approx(1.0, abs=1e-4)
    assert max(map(abs, found[0, 3].excess.values())) < 1e-5
    assert [head.kind for head in examples(found)] == list(KINDS)


def test_excess_is_the_mass_in_a_region_counted_token_by_token():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, len(AT), 8, generator=generator) for _ in range(2))
    found, _ = excess_mass(Call("random", 0, 0, LAYOUT, (q, k, k)), rows=len(AT))
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).double().softmax(-1)[0]
    for kind in ("local", "temporal"):
        value, inside = found[kind], torch.zeros(len(AT), len(AT))
        for i, (t, y, x) in enumerate(AT.tolist()):
            for j, (s, v, u) in enumerate(AT.tolist()):
                space = max(abs(y - v), abs(x - u))
                is_local = t == s or (abs(t - s) == 1 and space <= 2)
                inside[i, j] = is_local if kind == "local" else abs(t - s) >= 2 and space <= 1
        expected = (weights * inside).sum(-1).mean(-1) - inside.mean()
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_head_that_looks_at_itself_is_no_sink():
    call = heads()
    q, k = torch.eye(len(AT))[None, None] * 200, torch.eye(len(AT))[None, None] * 200
    found, _ = excess_mass(Call("self", 0, 0, call.layout, (q, k, k)))
    assert found["sink"].item() < 0.05
    assert found["local"].item() > 0.7


def test_no_key_is_local_and_temporal():
    found = regions(LAYOUT, torch.arange(0, LAYOUT.tokens, 5))
    assert not (found["local"] & found["temporal"]).any()
    assert all(region.any(-1).all() for region in found.values())


def test_the_page_has_a_picture_and_a_recall_per_kind(tmp_path, capsys):
    output = tmp_path / "maps.md"
    write(output, [heads()], ["made by hand"], [0.25, 1.0], rows=32)
    assert (tmp_path / "images" / "maps.png").read_bytes().startswith(b"\x89PNG")
    lines = output.read_text().splitlines()
    assert "- made by hand" in lines
    cells = [line.split("|")[1:-1] for line in lines if line.startswith(tuple(f"| {kind} " for kind in KINDS))]
    rows = {kind.strip(): values for kind, *values in cells}
    assert list(rows) == list(KINDS)
    values = {kind: [float(cell) for cell in cells[1:]] for kind, cells in rows.items()}
    assert all(cells[0].strip() == "1" for cells in rows.values())
    # At full density everything is covered; uniform attention is covered as far as blocks are.
    assert all(value == pytest.approx(1.0, abs=2e-3) for cells in values.values() for value in cells[1::2])
    assert values["local"][0] > values["global"][0]
    assert capsys.readouterr().out.strip() == output.read_text().strip()


def test_the_picture_of_a_query_shows_every_frame_once():
    q, k = (x[0, 0] for x in heads().qkv[:2])
    picture = query_picture(LAYOUT, q, k)
    assert picture.shape == (17, 4 * 9 - 1)
    assert (~picture.isnan()).sum() == LAYOUT.tokens
    assert picture[:8, 27:35].argmax() == 4 * 8 + 4  # frame 3 is the fourth of the upper line
