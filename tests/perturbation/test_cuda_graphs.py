"""A captured CUDA graph replays without Python: W moves outside of it, or the capture is refused."""

import pytest
import torch
from helpers import CUDA, changed, frozen, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer, register_low_rank


class Low(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16).requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, x):
        return self.linear(x) + x @ self.down.t() @ self.up.t()


register_low_rank(Low, base=lambda m: m.linear.weight, delta=lambda m: (m.up, m.down, 1.0))


def made(device):
    torch.manual_seed(0)
    model = nn.Sequential(Low(), nn.ReLU(), Low()).to(device)
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.3, schedule="constant")
    return model, frozen(model), optimizer, torch.randn(8, 16, device=device)


def loss_of(model, x):
    return model(x).square().mean()


def test_a_move_while_a_cuda_graph_is_captured_is_refused(monkeypatch):
    model, before, optimizer, x = made("cpu")
    with monkeypatch.context() as capturing:
        for name in ("is_initialized", "is_current_stream_capturing"):
            capturing.setattr(torch.cuda, name, lambda: True)
        with pytest.raises(RuntimeError, match=r"CUDA graph is captured.*optimizer\.perturb\(\) before the capture"):
            loss_of(model, x)
    optimizer.perturb()
    with monkeypatch.context() as capturing:
        for name in ("is_initialized", "is_current_stream_capturing"):
            capturing.setattr(torch.cuda, name, lambda: True)
        loss = loss_of(model, x)
        with pytest.raises(RuntimeError, match="CUDA graph is captured"):
            optimizer.step()
    loss.backward()
    optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_a_cuda_graph_of_forward_and_backward_has_new_noise_in_each_replay(device):
    model, before, optimizer, x = made(device)
    graph = torch.cuda.CUDAGraph()

    def run():
        loss_of(model, x).backward()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # torch's warm-up
        for _ in range(3):
            run()
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.perturb()
    with torch.cuda.graph(graph):
        run()
    optimizer.restore()
    found = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        optimizer.perturb()
        graph.replay()
        captured = [p.grad.clone() for p in trainable(model)]
        optimizer.zero_grad(set_to_none=False)
        run()
        for mine, parameter in zip(captured, trainable(model)):
            torch.testing.assert_close(mine, parameter.grad)
        found.append(captured[0])
        optimizer.step()
        assert not changed(model, before)
    assert not torch.equal(*found)
