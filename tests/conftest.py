"""Every test starts with one thread and the same seed. What tests share is in ``helpers.py``."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
