"""A cache of gradients reads the same batch twice in a step, without gradients and with: at the same W, or not at all."""

import pytest
import torch
from helpers import batch, lora_mlp, trainable

from flatopt import FlatPerturbOptimizer


@pytest.fixture
def run():
    model = lora_mlp()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    return model, FlatPerturbOptimizer(inner, model, sigma=0.2, schedule="constant"), batch()[0]


def first_pass(model, x):
    with torch.no_grad():
        answer = model(x)
    answer.requires_grad_().square().sum().backward()
    return answer


def test_a_first_pass_at_clean_weights_is_refused_and_the_way_out_works(run):
    model, optimizer, x = run
    first_pass(model, x)
    with pytest.raises(RuntimeError, match=r"with optimizer\.perturbed"):
        model(x)
    with optimizer.perturbed():
        answer = first_pass(model, x)
        again = model(x)
        assert torch.equal(again, answer)
        again.backward(answer.grad)
    optimizer.step()


@pytest.mark.parametrize("how", ["a part", "a closure"])
def test_reading_a_batch_before_a_step_is_no_first_pass_of_the_next_step(run, how):
    model, optimizer, x = run
    with torch.no_grad():
        model(x)

    def closure():
        loss = model(x).square().sum()
        loss.backward()
        return loss

    if how == "a part":
        model.base_model.model.second(torch.ones(2, 32)).sum().backward()
        closure()
        optimizer.step()
    else:
        optimizer.step(closure)
    model(x).sum().backward()
    optimizer.step()


def test_a_step_of_another_network_on_what_was_read_is_no_first_pass(run):
    model, optimizer, x = run
    critic = torch.nn.Linear(5, 1)
    of_critic = torch.optim.SGD(critic.parameters(), lr=0.1)
    for step in range(2):
        with torch.no_grad():
            made = model(x)
        critic(made).square().sum().backward()
        of_critic.step()
        critic(model(x)).sum().backward()
        optimizer.step()
        assert optimizer.step_count == step + 1
