"""How a step goes through the files of flatopt: as docs/design.md says, and the same for any number of layers."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import trainable
from torch import nn

import flatopt
from flatopt import FlatPerturbOptimizer

peft = pytest.importorskip("peft")
ROOT = Path(flatopt.__file__).parent
MAIN = {
    *("perturbation/hooks.py", "perturbation/doors.py", "optimizers/flat.py", "perturbation/weights.py"),
    *("perturbation/look.py", "adapters/peft.py", "ops/torch_backend.py"),
}


def calls(act):
    """(caller's file, callee's file) -> calls from one file of flatopt to another, those below a plan apart."""
    found = Counter()

    def profile(frame, event, arg):
        if event != "call" or frame.f_back is None:
            return
        ends = [Path(each.f_code.co_filename) for each in (frame.f_back, frame)]
        if all(end.is_relative_to(ROOT) for end in ends) and ends[0] != ends[1]:
            caller, callee = (end.relative_to(ROOT).as_posix() for end in ends)
            if not caller.startswith("ops/"):
                found[caller, callee] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(before)
    return found


def calls_of_a_step(layers):
    names = [str(number) for number in range(layers)]
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in names))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names)).train()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, schedule="constant")
    x = torch.ones(2, 8)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    outputs = []
    there = calls(lambda: outputs.append(model(x)))
    outputs.pop().sum().backward()
    return there, calls(optimizer.step)


def test_calls_from_file_to_file_do_not_depend_on_the_number_of_layers():
    # in a process of its own: optimizers that other tests left alive are asked too, at every step of any
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    there, back = calls_of_a_step(1)
    assert calls_of_a_step(12) == (there, back)
    between = {pair: count for pair, count in there.items() if set(pair) <= MAIN}
    assert {file for pair in between for file in pair} == MAIN
    assert sum(between.values()) <= 11, between
    assert sum(there.values()) <= 30, there
    assert sum(back.values()) <= 18, back
