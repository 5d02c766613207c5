"""Modules handed to other processes, which share their memory: it works, and says that they see the noise."""

import copy
import os
import warnings

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer


def work(layer, found):
    found.put(float(layer(torch.ones(1, 16)).sum()))


@pytest.mark.parametrize("amid", [True, False])
def test_a_spawned_worker_is_given_a_layer(amid):
    model = lora_mlp()
    before = frozen(model)
    layer = model.get_base_model().first.base_layer
    want = float(layer(torch.ones(1, 16)).sum())
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.3, schedule="constant")
    if amid:
        loss = model(batch()[0]).sum()
    context = torch.multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=work, args=(layer, found), daemon=True)
    with pytest.warns(UserWarning, match=r"another process is given.*sees their noise.*deepcopy"):
        process.start()
    seen = found.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    assert (seen == pytest.approx(want, abs=1e-4)) is not amid
    if amid:
        loss.backward()
    else:
        optimizer.perturb()
    optimizer.step()
    assert not changed(model, before)


def test_a_copy_is_clean_and_its_own(model):
    layer = model.get_base_model().first.base_layer
    want = float(layer(torch.ones(1, 16)).sum())
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.3, schedule="constant")
    model(batch()[0])
    context = torch.multiprocessing.get_context("spawn")
    found = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process = context.Process(target=work, args=(copy.deepcopy(layer), found), daemon=True)
        process.start()
    assert found.get(timeout=120) == pytest.approx(want, abs=1e-4)
    process.join()
    optimizer.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_that_shares_the_memory_may_not_move_the_weights(model, before, capfd):
    model.share_memory()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.3, schedule="constant")
    loss = model(batch()[0]).sum()
    noisy = frozen(model)
    child = os.fork()
    if child == 0:
        try:
            with torch.no_grad():
                model(batch()[0])
        except RuntimeError as error:
            os.write(1, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert "lies in memory that this process shares" in capfd.readouterr().out
    assert not changed(model, noisy)
    loss.backward()
    optimizer.step()
    assert not changed(model, before)
