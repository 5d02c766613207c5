"""Processes with a group between them (gloo, or NCCL on GPUs): what each found, and an end to those that hang."""

import os
import time

import pytest
import torch
from torch import distributed as dist

USABLE = os.name != "nt" and dist.is_available() and dist.is_gloo_available()


def on_ranks(folder, work, *args, world=2, timeout=240, backend="gloo"):
    """What ``work(rank, *args)`` returned in each of ``world`` processes; an exception in one ends all."""
    context = torch.multiprocessing.spawn(
        _rank, (world, str(folder), backend, work, args), nprocs=world, join=False, daemon=True
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                raise TimeoutError(f"{work} still runs after {timeout} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]


def shared_by_all_tests(work, missing):
    """A fixture ``on_two_ranks(job)``: what ``work`` found for the job on each of two ranks, or else a skip: ``missing``.

    Starting processes is slow: ``work(rank)`` runs once for all tests of a file and gives a dict, job by job.
    """

    @pytest.fixture(scope="module")
    def on_two_ranks(tmp_path_factory):
        results = on_ranks(tmp_path_factory.mktemp("ranks"), work)

        def of(job):
            if job not in results[0]:
                pytest.skip(missing)
            return [each[job] for each in results]

        return of

    return on_two_ranks


def _rank(rank, world, folder, backend, work, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", OMP_NUM_THREADS="1")
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")  # DeepSpeed's decorators would import inductor
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(work(rank, *args), str(rank))
    finally:
        dist.destroy_process_group()
