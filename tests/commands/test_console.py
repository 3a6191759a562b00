"""Progress is one line that is rewritten, or a few ordinary ones where no line can be."""

from __future__ import annotations

import os
import shutil

import pytest

from pagedserve.commands import console
from pagedserve.commands.console import Console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output counts as a terminal of 60 columns."""
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))


def test_progress_is_rewritten_in_place(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    say = Console()
    for line in ("begin", "\rhalf (50 %)", "\rnearly (99 %)", "done"):
        say(line)
    assert capsys.readouterr().out == (
        "begin\n"
        "\r\x1b[Khalf (50 %) [############............]"
        "\r\x1b[Knearly (99 %) [#######################.]\n"
        "done\n"
    )


def test_a_line_that_is_too_long_is_cut_and_not_wrapped(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    say = Console()
    say("\r" + "x" * 45 + " 50 %")
    say("\r" + "x" * 46 + " 50 %")
    say("\r" + "y" * 100)
    say.end()
    assert capsys.readouterr().out == (
        f"\r\x1b[K{'x' * 45} 50 % [###...]\r\x1b[K{'x' * 46} 50 %\r\x1b[K{'y' * 59}\n"
    )


def test_elsewhere_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    say = Console()
    for seconds in range(12):
        now[0] = 50.0 + seconds
        say(f"\rat {seconds}")
    say("done")
    say.end()
    assert capsys.readouterr().out == "at 0\nat 5\nat 10\ndone\n"
