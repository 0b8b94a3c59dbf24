"""Bars and spinners leave what is shown and what is counted as it was."""

import pytest

from deploy import progress


def test_every_item_comes_once_and_a_file_sees_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.waiting("slowly"):
        assert list(progress.track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_terminal_sees_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.track(["a", "b"], "letters")) == ["a", "b"]
    assert "letters" in capsys.readouterr().err
