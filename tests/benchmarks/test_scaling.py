"""The scaling benchmark with gloo: what it counts is what the arithmetic says, and a failure is told."""

import json
from collections import Counter

import pytest
import torch
from ranks import USABLE

for extra in ("peft", "transformers", "matplotlib", "rich"):
    pytest.importorskip(extra)
if not (USABLE and hasattr(torch.distributed, "fsdp") and hasattr(torch.distributed.fsdp, "fully_shard")):
    pytest.skip("needs gloo, and FSDP2, public from torch 2.6 on", allow_module_level=True)

from benchmarks.scaling import __main__ as scaling  # noqa: E402  after the skips
from benchmarks.scaling.ranks import measure  # noqa: E402
from benchmarks.scaling.show import is_right  # noqa: E402

SMALL = ["--device", "cpu", "--turns", "1", "--steps", "2", "--toggles", "1"]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    """What each of two ranks found, by the command."""
    out = tmp_path_factory.mktemp("out")
    assert scaling.main([*SMALL, "--ranks", "2", "--shardings", "fsdp2", "--out", str(out)]) == 0
    assert (out / "scaling_cpu.png").stat().st_size > 5000
    result = json.loads((out / "scaling_cpu.json").read_text(encoding="utf-8"))
    assert not result["failed"]
    (cell,) = result["cells"]
    return cell["each"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What a group of this process alone finds: starting others is slow."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        return [measure(0, "ddp", scaling.arguments(SMALL))]
    finally:
        torch.distributed.destroy_process_group()


def calls(rank, where):
    return rank["collectives"][where]["calls"]


def test_ddp_sends_nothing_more(ddp):
    (rank,) = ddp
    assert calls(rank, "perturb") == calls(rank, "restore") == {}
    assert calls(rank, "flat step") == calls(rank, "plain step")
    assert calls(rank, "plain step")["allreduce"] >= 1  # the counting sees what C++ calls in backward


def test_fsdp2_gathers_all_as_in_one_call_a_step_and_nothing_else(fsdp2):
    for rank in fsdp2:
        assert calls(rank, "perturb") == {"allgather_base": 1}
        assert calls(rank, "restore") == {}
        assert calls(rank, "flat step") == Counter(calls(rank, "plain step")) + Counter(calls(rank, "perturb"))
        added, plain = (rank["collectives"][where]["received_bytes"] for where in ("flat step", "plain step"))
        # q, k, v, o, gate, up read 128 inputs, down 352; rank 8, fp32, two layers; half of it comes from the other rank
        assert rank["a_bytes"] == 2 * (6 * 128 + 352) * 8 * 4
        assert added - plain == rank["collectives"]["perturb"]["received_bytes"] == rank["a_bytes"] // 2
        assert {"allgather_base", "reduce_scatter_base"} <= set(calls(rank, "plain step"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_all_weights_had_noise_and_came_back(sharding, request):
    for rank in request.getfixturevalue(sharding):
        assert rank["layers"] == rank["perturbed"] == 14
        assert rank["checksum"]["before"] == rank["checksum"]["after"] != rank["checksum"]["perturbed"]
        assert is_right(rank)
        assert not is_right({**rank, "back": False})
        assert not is_right({**rank, "perturbed": 13})
        assert rank["plain_ms"]["repeats"] == 4
        assert rank["flat_ms"]["repeats"] == 2
        assert all(part["median"] > 0 for parts in rank["toggles"].values() for part in parts.values())


def test_a_cell_that_fails_is_told_and_the_others_are_kept(fsdp2, tmp_path, monkeypatch, capsys):
    def on_ranks(world, sharding, args):
        if sharding == "ddp":
            raise RuntimeError("no NCCL here")
        return [{**rank, "back": False} for rank in fsdp2]

    monkeypatch.setattr(scaling, "on_ranks", on_ranks)
    assert scaling.main([*SMALL, "--ranks", "2", "--out", str(tmp_path)]) == 1
    assert scaling.main([*SMALL, "--ranks", "2", "--shardings", "fsdp2", "--out", str(tmp_path / "wrong")]) == 1
    result = json.loads((tmp_path / "scaling_cpu.json").read_text(encoding="utf-8"))
    assert result["failed"] == {"ddp, 2 ranks": "no NCCL here"}
    assert [cell["sharding"] for cell in result["cells"]] == ["fsdp2"]
    told = capsys.readouterr()
    assert "NO" in told.out
    assert "no NCCL here" in told.err
