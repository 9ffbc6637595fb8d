"""Runs jobs: builds the problem, checks dlops against eager, times all contenders, fills the rows."""

import functools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dlops
from bench import measure
from bench.case import DIRECTIONS, Job, Problem, Unavailable
from bench.rows import Row, Run

Say = Callable[[str], None]
TOO_FAR = 0.05  # of the largest value: a dlops result this far from eager's is wrong, whatever the dtype


@dataclass(frozen=True)
class Settings:
    """``seconds`` of timing per row; whether torch.compile and peers take part."""

    seconds: float = 1.0
    rivals: bool = True


def run(jobs: Iterable[Job], into: Run, settings: Settings, say: Say) -> Iterator[Job]:
    """Measure ``jobs``, adding rows, failures and skipped jobs to ``into``; yields each job when it is done."""
    for job in jobs:
        say(str(job))
        try:
            for direction in job.case.directions:
                into.rows.append(_row(job, direction, into.ceilings, settings, say))
        except Unavailable as reason:
            into.skipped[str(job)] = str(reason)
        except Exception as error:
            into.failures[str(job)] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        if job.device == "cuda":
            torch.cuda.empty_cache()
        yield job


def _row(job: Job, direction: str, ceilings: dict[str, Any], settings: Settings, say: Say) -> Row:
    with torch.set_grad_enabled(direction != "forward"):
        problem = job.case.problem(job.shape, job.device, job.dtype)
        functions = {"dlops": problem.dlops, "eager": problem.eager}
        if settings.rivals and not job.small:
            torch.compiler.reset()
            if problem.compile:
                functions["compile"] = torch.compile(problem.eager, dynamic=False)
            functions |= problem.peers
        calls = contenders(functions, problem, direction)
        difference = _difference(calls["dlops"](), calls["eager"]())
        if not difference < TOO_FAR:
            raise AssertionError(f"{direction}: dlops and eager differ by {difference:.2g} of the largest value")
        decisions = dlops.explain(calls["dlops"]).decisions
        say(f"{job} {direction}: compiling")
        errors: dict[str, str] = {}
        _warm_up(calls, errors)

        say(f"{job} {direction}: timing")
        seconds = settings.seconds / 4 if job.small else settings.seconds
        samples = measure.rounds(calls, job.device, seconds, batch=40 if job.small else 1)
        ms = {name: measure.median(times) for name, times in samples.items()}
        index = DIRECTIONS.index(direction)
        byte_time = problem.bytes[index] / ceilings["copy"]
        flop_time = problem.flops[index] / ceilings["matmul"][job.dtype]
        return Row(
            case=job.case.name,
            family=job.case.family,
            shape=job.case.describe(job.shape),
            dtype=job.dtype,
            device=job.device,
            direction=direction,
            small=job.small,
            backend="+".join(dict.fromkeys(decision.backend for decision in decisions)) or "torch",
            ms=ms,
            iqr={name: measure.spread(times) for name, times in samples.items()},
            speedup={name: measure.paired(t, samples["dlops"]) for name, t in samples.items() if name != "dlops"},
            bytes=problem.bytes[index],
            flops=problem.flops[index],
            roofline=1e3 * max(byte_time, flop_time) / ms["dlops"],
            bound="bytes" if byte_time >= flop_time else "flops",
            memory={name: measure.peak_memory(call, job.device) for name, call in calls.items()},
            difference=difference,
            added_us=1e3 * measure.median([a - b for a, b in zip(samples["dlops"], samples["eager"], strict=True)]),
            graph_ms=_graph_ms(calls, settings.seconds, errors) if job.device == "cuda" else {},
            errors=errors,
            note=problem.note() if problem.note and direction == "forward" and not job.small else "",
        )


def contenders(functions: dict[str, Callable[..., Any]], problem: Problem, direction: str) -> dict[str, measure.Call]:
    """What is timed: each function called with the problem's arguments, and its gradients computed if asked for."""
    if direction == "forward":
        return {name: functools.partial(function, *problem.args) for name, function in functions.items()}
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in _tensors(next(iter(functions.values()))(*problem.args))]
    return {name: _step(function, problem.args, grads) for name, function in functions.items()}


def _step(function: Callable[..., Any], args: tuple[Tensor, ...], grads: list[Tensor]) -> measure.Call:
    if isinstance(function, nn.Module):
        inputs = list(function.parameters())
    else:
        args = tuple(a.detach().requires_grad_() if a.is_floating_point() else a for a in args)
        inputs = [a for a in args if a.requires_grad]

    def step() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(_tensors(function(*args)), inputs, grads, allow_unused=True)

    return step


def _warm_up(calls: dict[str, measure.Call], errors: dict[str, str]) -> None:
    """Call the rivals (dlops and eager have run already); drop those that cannot run, keeping why."""
    for name in [name for name in calls if name not in ("dlops", "eager")]:
        try:
            for _ in range(2):
                calls[name]()
        except Exception as error:
            del calls[name]
            errors[name] = _brief(error)


def _graph_ms(calls: dict[str, measure.Call], seconds: float, errors: dict[str, str]) -> dict[str, float]:
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = measure.graphed(call)
        except Exception as error:
            torch.cuda.synchronize()
            errors[f"{name}, CUDA graph"] = _brief(error)
    samples = measure.rounds(graphs, "cuda", seconds / 2) if graphs else {}
    return {name: measure.median(times) for name, times in samples.items()}


def _difference(ours: Any, theirs: Any) -> float:
    """The largest over tensors of max|a - b| / max|b|; NaN where a result has NaN. Tensors that are zero but for
    rounding (a key bias's gradient) are compared with a thousandth of the largest tensor's maximum."""
    pairs = [
        (a.detach().double(), b.detach().double())
        for a, b in zip(_tensors(ours), _tensors(theirs), strict=True)
        if a is not None and b is not None and b.numel()
    ]
    floor = 1e-3 * max((float(b.abs().max()) for _, b in pairs), default=0.0)
    ratios = [float((a - b).abs().max()) / max(float(b.abs().max()), floor, 1e-30) for a, b in pairs]
    return float("nan") if any(math.isnan(ratio) for ratio in ratios) else max(ratios, default=0.0)


def _tensors(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
