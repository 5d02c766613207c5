"""Whole steps, and perturb and restore by themselves: milliseconds and memory."""

import re
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from .methods import METHODS, Plain, made
from .models import Case
from .summary import over_plain, summary

WARM_UP = 1  # steps, at each turn
TURN, MOST_STEPS, LEAST_TURNS = 0.3, 100, 3  # a turn's seconds, at most so many steps; turns of a method, at least
TOGGLES = 12  # seconds to time perturb and restore for


class Clock:
    """Points in the device's time, and milliseconds between them."""

    def __init__(self, device: str):
        self.device, self.points = device, []

    def mark(self) -> None:
        if self.device == "cuda":
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def intervals(self) -> "list[float]":
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.points, self.points[1:])]
        return [1e3 * (b - a) for a, b in zip(self.points, self.points[1:])]


class Peak:
    """The most memory in use since it was made, in GB: allocated on a GPU, resident (Linux) on a CPU."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> "float | None":
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        if sys.platform == "linux":
            return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
        return None


def take_turn(make: Callable, case: Case, accumulation: int, device: str, steps: "int | None"):
    """A new method for a while: (milliseconds of each step, peak memory).

    Without ``steps``, as many as fill TURN.
    """
    with made(make, case) as method:
        for _ in range(WARM_UP):
            method.step(1)
        if device == "cuda":
            torch.cuda.synchronize()
        peak, clock, began = Peak(device), Clock(device), time.perf_counter()
        clock.mark()
        while len(clock.points) <= (steps or MOST_STEPS):
            method.step(accumulation)
            clock.mark()
            if device == "cuda" and accumulation * len(clock.points) % 16 == 0:
                clock.points[-1].synchronize()  # or the host would queue steps without end
            if not steps and time.perf_counter() - began > TURN:
                break
        return clock.intervals(), peak.gigabytes()


def time_toggle(method: Plain, device: str) -> "list[float]":
    """Milliseconds to perturb and to restore."""
    clock = Clock(device)
    if device == "cuda":
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms: the host gets ahead
    clock.mark()
    method.perturb()
    clock.mark()
    method.restore()
    clock.mark()
    return clock.intervals()


def time_toggles(methods: "list[str]", case: Case, device: str) -> "dict[str, dict]":
    """Milliseconds to perturb and to restore, of the methods that can do it by themselves, and their sum over the official
    procedure's; they take turns, one at a time."""
    times = {name: [] for name in methods if not name.startswith("SAM")}
    rounds, began = 0, time.perf_counter()
    while times and (time.perf_counter() - began < TOGGLES or rounds < 5):
        rounds += 1
        for name, found in times.items():
            with made(METHODS[name], case) as method:
                time_toggle(method, device)  # finds the square sums of W, and compiles
                found.append(time_toggle(method, device))
    toggles = {}
    for name, found in times.items():
        there, back = zip(*found)
        toggles[name] = {"perturb_ms": summary(there), "restore_ms": summary(back), "both_ms": summary([*map(sum, found)])}
        if "official procedure" in times:
            ratios = [sum(own) / sum(official) for own, official in zip(found, times["official procedure"])]
            toggles[name]["both_over_official"] = summary(ratios)
    return toggles


def compare(name: str, case: Case, accumulation: int, device: str, seconds: float) -> "tuple[dict, list, float | None]":
    """The cell of a method, and the step times and peak memory of the plain turns around its own."""
    plain, own, plain_peaks, peaks, began = [], [], [], [], time.perf_counter()
    while len(own) < LEAST_TURNS or time.perf_counter() - began < seconds:
        steps = len(own[0]) if own else None
        for make, turns, most in ((Plain, plain, plain_peaks), (METHODS[name], own, peaks)):
            samples, peak = take_turn(make, case, accumulation, device, steps)
            turns.append(samples)
            most.append(peak)
    plain.append(take_turn(Plain, case, accumulation, device, len(own[0]))[0])
    cell = {"step_ms": summary([*chain(*own)]), "ratio": over_plain(own, plain), "peak_gb": None, "peak_gb_over_plain": None}
    if None not in peaks:
        cell.update(peak_gb=max(peaks), peak_gb_over_plain=max(peaks) - max(plain_peaks))
    return cell, [*chain(*plain)], None if None in plain_peaks else max(plain_peaks)


def measure(case: Case, accumulations: "list[int]", methods: "list[str]", device: str, seconds: float, tick: Callable):
    """Rows of results, yielded as far as they are, after each accumulation; ``tick(what)`` before each cell."""
    rows = []
    for accumulation in accumulations:
        cells, every_plain = {}, []
        for name in methods:
            tick(f"accumulation {accumulation}: {name}")
            cells[name], samples, plain_peak = compare(name, case, accumulation, device, seconds)
            every_plain += samples
        zero = None if plain_peak is None else 0.0
        row = {"step_ms": summary(every_plain), "ratio": None, "peak_gb": plain_peak, "peak_gb_over_plain": zero}
        rows += [
            {"method": name, "accumulation": accumulation, **cell} for name, cell in {"plain LoRA": row, **cells}.items()
        ]
        yield rows
