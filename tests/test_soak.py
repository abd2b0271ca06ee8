"""The server under many requests of all kinds (`experiments/soak_server.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("flask")
pytest.importorskip("waitress")
pytest.importorskip("prometheus_client")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))


@pytest.mark.parametrize("count", [16, pytest.param(1000, marks=pytest.mark.long)])
def test_nothing_is_lost_nothing_stays_and_every_text_is_the_offline_one(count: int) -> None:
    import soak_server as soaking

    with soaking.served() as (service, port):
        found = soaking.soak(port, count, 16)
        assert soaking.at_rest(service)
    assert found.other == []
    assert len(found.texts) > count // 2
    assert found.left > count // 20
    assert {body["model"] for body, _, _ in found.texts} == set(soaking.NAMES)
    assert soaking.differing(found) == []
    if count == 1000:
        assert found.memory[-1] < found.memory[len(found.memory) // 4] + (8 << 20)
