"""Who computes: a thread that hands its work to another keeps no team of its own beside the other's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, threading, torch
from functional_lm.compile import release_threads

def teams():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = teams()
x = torch.ones(1 << 20)
first = x.add(1).sum()
shared = teams()
release_threads()
after = teams()
assert x.add(1).sum() == first
print(before, shared, after, teams())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where the system lists them")
def test_a_team_is_given_back_and_made_anew() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    before, shared, after, again = map(int, done.stdout.split())
    assert shared == before + 2
    assert after == before
    assert again == shared
