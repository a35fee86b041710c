"""The one protocol of progress, on functions of several packages."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console
from torch import nn

from dreamreader import zoo
from dreamreader._progress import (
    ProgressEvent,
    pipeline_steps,
    show_progress,
    silent,
    terminal_display,
    track,
)
from dreamreader.attention import word_maps
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.fitting import Recipe, fit
from dreamreader.localise import ablate_grid, lens
from dreamreader.recording import record_calls
from dreamreader.sweep import grid
from dreamreader.zoo.evaluate import evaluate


def learn(progress: Any) -> None:
    layer = nn.Linear(2, 2)
    fit(layer, lambda m, x: m(x).square().mean(), [torch.eye(2)], Recipe(steps=3), None, progress)


def sweep(progress: Any) -> None:
    reader = Reader(*tiny.language_model("gpt2"))
    cells = grid(reader, "transformer.h.*")
    ablate_grid(
        reader,
        ["a cat"],
        cells,
        metric=lambda run: np.zeros(len(run.rows)),
        batch_size=1,
        progress=progress,
    )


def draw(progress: Any, **given: Any) -> Any:
    pipe = tiny.pipeline("sd")
    pipe.set_progress_bar_config(desc="bar of diffusers")
    given = {"seeds": [0, 1], "batch_size": 1, "num_inference_steps": 2} | given
    found = Reader(pipe).run("a cat", output_type="latent", progress=progress, **given)
    assert "progress_bar" not in vars(pipe)
    assert pipe._progress_bar_config == {"desc": "bar of diffusers"}
    return found


def write(progress: Any) -> None:
    reader = Reader(*tiny.language_model("gpt2"))
    reader.run(["a cat", "a dog"], batch_size=1, progress=progress)


def read_layers(progress: Any) -> None:
    kinds = {"seeds": 0, "num_inference_steps": 1, "output_type": "latent"}
    lens(Reader(tiny.pipeline("sd")), "a cat", layers=[0, 1], progress=progress, **kinds)


def map_words(progress: Any) -> None:
    kinds = {"seeds": 0, "num_inference_steps": 1, "output_type": "latent"}
    word_maps(Reader(tiny.pipeline("sd")), "a cat", "cat", progress=progress, **kinds)


def call(progress: Any) -> None:
    kinds = {"num_inference_steps": 1, "batch_size": 1}
    record_calls(Reader(tiny.pipeline("sd")), ["a cat", "a dog"], progress=progress, **kinds)


def judge(progress: Any) -> None:
    pipe = zoo.load_pipeline("shapes-unet")
    pipe.set_progress_bar_config(desc="bar of diffusers")
    evaluate(pipe, 2, progress=progress, num_inference_steps=1)
    assert pipe._progress_bar_config == {"desc": "bar of diffusers"}


LONG = {
    "learn": ("training", learn, [1, 2, 3]),
    "sweep": ("cells", sweep, [0, 3]),
    "pipeline": ("rows", draw, [0, 0.5, 1, 1, 1.5, 2, 2]),
    "language": ("rows", write, [0, 1, 2]),
    "lens": ("rows", read_layers, [0, 2, 2]),
    "maps": ("rows", map_words, [0, 1, 1]),
    "calls": ("rows", call, [0, 1, 1, 1, 2, 2]),
    "evaluate": ("batches", judge, [0, 1]),
}


@pytest.mark.parametrize("name", list(LONG))
def test_a_function_hears_of_every_stage(name: str):
    stage, work, done = LONG[name]
    events: list[ProgressEvent] = []
    work(events.append)
    assert {each.stage for each in events} == {stage}
    assert [each.done for each in events] == done and events[-1].done == events[-1].total
    if stage == "training":
        assert set(events[0].numbers) == {"loss"} and events[0].note.startswith("loss ")


@pytest.mark.parametrize("name", list(LONG))
@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_shown_where_nobody_looks(name: str, progress: bool, capfd):
    LONG[name][1](progress)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [None, 1, "yes"])
@pytest.mark.parametrize("name", list(LONG))
def test_anything_else_is_refused(name: str, progress: Any):
    with pytest.raises(InvalidInput, match=r"give True, False, or a function that takes a Progr"):
        LONG[name][1](progress)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Callable[[], str]]:
    """Makes of stderr a terminal; gives what tells what it shows."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def opened() -> Callable[[], str]:
        shown = Terminal()
        monkeypatch.setattr(sys, "stderr", shown)  # in the test: pytest sets it before
        monkeypatch.setenv("TERM", "xterm")
        return shown.getvalue

    return opened


def test_a_terminal_shows_one_display(terminal):
    read = terminal()
    with show_progress(True) as report:
        report(ProgressEvent("rows", 1, 2, note="fast", text="2 rows"))
        learn(True)  # within the other: it would tear that one
        report(ProgressEvent("rows", 2, 2, note="faster"))
    shown = read()
    assert "rows" in shown and "100%" in shown and "faster" in shown and "2 rows" in shown
    assert "training" not in shown
    learn(True)
    assert "training" in read() and "loss" in read()


def test_the_steps_of_a_pipeline_are_shown_once(terminal):
    read = terminal()
    draw(True)
    shown = read()
    assert "rows" in shown and "100%" in shown
    assert "bar of diffusers" not in shown


def test_bars_of_the_callers_own_are_back_after_an_error():
    pipe = tiny.pipeline("sd")
    own: Any = lambda *_, **__: pytest.fail("shown")  # noqa: E731
    pipe.progress_bar = own
    with pytest.raises(ZeroDivisionError), pipeline_steps(pipe, lambda step, steps: 1 // 0):
        for _ in pipe.progress_bar([1, 2]):
            pass
    assert pipe.progress_bar is own


@pytest.mark.parametrize("progress", [False, lambda event: None])
def test_what_is_silent_stays_silent_within(progress: Any, terminal):
    read = terminal()
    with show_progress(progress):
        learn(True)
    assert read() == ""


def test_a_notebook_shows_bars_of_tqdm(monkeypatch: pytest.MonkeyPatch, capsys):
    shell = type("Shell", (), {"kernel": None})()
    module = type(sys)("IPython")
    module.get_ipython = lambda: shell  # pyright: ignore
    monkeypatch.setitem(sys.modules, "IPython", module)
    with show_progress(True) as report:
        report(ProgressEvent("rows", 3, 5, note="fast", text="5 rows"))
        report(ProgressEvent("rows", 5, 5))
    shown = capsys.readouterr()
    assert "rows: " in shown.err and "5/5" in shown.err and "5 rows" in shown.out + shown.err


def test_items_are_tracked_and_the_last_state_is_printed_without_a_terminal():
    file = io.StringIO()
    with terminal_display(Console(file=file, width=200)) as display:
        assert list(track(["a", "b"], "units", display)) == ["a", "b"]
    assert "units" in file.getvalue() and "100%" in file.getvalue()


def test_an_error_leaves_the_next_display_as_it_was(terminal):
    terminal()
    with pytest.raises(ValueError), show_progress(False):
        raise ValueError
    with show_progress(True) as report:
        assert report is not silent
