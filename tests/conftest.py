"""Every test starts with one thread and the same seed. What tests share is in ``helpers.py``."""

import gc
import os
import signal

import pytest
import torch
from helpers import frozen, lora_mlp


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file whose tests share what processes of its own found goes to one worker; all others test by test."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if any(part in file for part in ("distributed/", "_ranks", "_scaling", "_ablation")) else nodeid

    return Scheduling(config, log) if config.option.dist == "load" else None


def pytest_collection_finish():
    """What imports left is looked through no more: by the collector, and for modules that share memory with a weight."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _larger_programs_in_tritons_interpreter():
    """It takes its time by the program, not by the element; the noise is the same."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from flatopt.ops.triton import launch

        launch.ROWS = 16


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """Also where the suite was started in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model():
    return lora_mlp()


@pytest.fixture
def before(model):
    """The frozen weights as they were."""
    return frozen(model)
