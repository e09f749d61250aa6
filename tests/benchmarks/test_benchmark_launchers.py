"""Benchmarks start their ranks where the environment's programs are not on PATH."""

import os
import subprocess

import invariance
import launchers
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [launchers.deepspeed, launchers.torchrun])
def test_a_launcher_is_found_without_path(launcher, tmp_path):
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run([*launcher(2), "--help"], env=environment, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout


def test_invariance_starts_its_ranks_with_it(monkeypatch):
    started = []
    monkeypatch.setattr(invariance, "make_inputs", lambda folder: None)
    monkeypatch.setattr(invariance, "outcomes", lambda *_: [])
    monkeypatch.setattr(invariance, "table", lambda results: "")
    monkeypatch.setattr(invariance.subprocess, "run", lambda command, **_: started.append(command))
    monkeypatch.setattr(launchers, "free_port", lambda: 7)
    assert invariance.main(invariance.Arguments(steps=1)) == 0
    ranks = sorted({way.world_size for way in invariance.WAYS})
    assert [command[: len(launchers.deepspeed(1))] for command in started] == [launchers.deepspeed(n) for n in ranks]
