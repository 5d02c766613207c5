"""Offline, on the CPU, each test with accelerate's states of its own; skipped where the trainers are not installed."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("trl") is None:  # the plain tests stay light
        skip = pytest.mark.skip(reason="needs pip install '.[integrations]' (trl is not there)")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    try:
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        return
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
