"""Logging of the commands: level, rank, stderr, one handler however often it is set up."""

from __future__ import annotations

import logging

from dataloaders import logs


def printed(capsys) -> list[str]:
    for logger in ("engine.loop", "pite_kernels.attention", "someone.else"):
        logging.getLogger(logger).info("info of %s", logger)
        logging.getLogger(logger).warning("warning of %s", logger)
    captured = capsys.readouterr()
    assert not captured.out
    return [line.partition(" ")[2] for line in captured.err.splitlines()]


def test_our_packages_at_the_level_and_warnings_of_others(capsys):
    logs.configure()
    logs.configure()
    assert printed(capsys) == [
        "INFO    info of engine.loop",
        "WARNING warning of engine.loop",
        "INFO    info of pite_kernels.attention",
        "WARNING warning of pite_kernels.attention",
        "WARNING warning of someone.else",
    ]
    logs.configure("error")
    assert printed(capsys) == ["WARNING warning of someone.else"]


def test_ranks_are_named_and_only_the_first_prints_everything(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    logs.configure("debug")
    assert printed(capsys)[0] == "WARNING rank 1: warning of engine.loop"
    monkeypatch.setenv("RANK", "0")
    logs.configure()
    assert printed(capsys)[0] == "INFO    rank 0: info of engine.loop"
