"""The nearest names: by the part of a path that is wrong, for globs and ports too."""

import time

import pytest

from dreamreader.errors import UnknownName, first_line, nearest

BLOCKS = [
    f"unet.{side}_blocks.{block}.attentions.{n}.transformer_blocks.0{part}"
    for side in ("down", "up")
    for block in range(3)
    for n in range(2)
    for part in ("", ".attn1", ".attn1.to_q", ".attn2", ".attn2.to_q", ".ff", ".norm1", ".norm2")
]
PATHS = ["unet", "unet.conv_in", "unet.mid_block", "vae", "vae.encoder.mid_block", *BLOCKS]
LONG = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    "asked, best",
    [
        ("unet.**.atn2", "unet.**.attn2"),
        ("unet.**.atn*", "unet.**.attn1"),
        ("unet.up_block.[01].**.attn2", "unet.up_blocks.[01].**.attn2"),
        ("unte.*.2.**.attn2", "unet.*.2.**.attn2"),
        ("**.cross_attn2", "**.attn2"),
        (LONG.replace("attn2", "atn2"), LONG),
        (LONG.replace("attentions", "atention"), LONG),
        (LONG.replace("down_blocks", "down_block"), LONG),
        (LONG.replace("unet", "net"), LONG),
        (LONG.replace(".transformer_blocks.0", ""), LONG),
        (LONG.replace(".1.", ".7."), LONG.replace(".1.", ".2.")),
        (LONG.replace("attn2", "attn2.atn2"), LONG),
        ("unet.mid_blok", "unet.mid_block"),
        ("mid_block", "unet.mid_block"),
        ("unett", "unet"),
    ],
)
def test_the_part_that_is_wrong_is_put_right(asked: str, best: str) -> None:
    assert nearest(asked, PATHS)[0] == best


def test_what_a_glob_comes_back_as_matches_something() -> None:
    from dreamreader.engine._pattern import parse

    asked = ["unet.**.atn2", "up_blocks.*.attn2", "unet.*.attn1", "foo.**.to_q", "unet.*.x.attn2"]
    for glob in asked:
        found = nearest(glob, PATHS)
        assert found, glob
        for each in found:
            assert any(parse(each).matches(path) for path in PATHS), (glob, each)


def test_ports_stay_with_their_paths() -> None:
    known = [f"{path}:heads" for path in BLOCKS if path.endswith(("attn1", "attn2"))]
    assert nearest("unet.**.atn2:heads", known)[0] == "unet.**.attn2:heads"
    assert nearest(f"{LONG}:hads", known)[0] == f"{LONG}:heads"
    assert nearest(LONG.replace("attn2", "atn2") + ":heads", known)[0] == f"{LONG}:heads"


def test_what_is_far_from_everything_has_no_nearest() -> None:
    assert nearest("foo.bar", PATHS) == nearest("qqq", PATHS) == nearest("a.b", []) == []
    assert "nearest: unet, unet.conv_in" in str(UnknownName("site", "foo.bar", PATHS))


def test_short_names_are_found_by_their_beginning() -> None:
    assert nearest("value", ["q", "k", "v", "heads"]) == ["v"]
    assert nearest("hads", ["q", "k", "v", "heads"]) == ["heads"]


def test_thousands_of_paths_take_no_time() -> None:
    many = [f"{path}.{n}" for path in BLOCKS for n in range(50)]
    begun = time.process_time()
    nearest(LONG.replace("attn2", "atn2"), many)
    assert len(many) > 4000 and time.process_time() - begun < 5


def test_first_lines_end_with_a_word() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    long = first_line(ValueError("word " * 200))
    assert len(long) <= 300 and long.endswith("word ...")
