"""``pytest bench/``: every case on its smallest shape under pytest-benchmark, to compare one commit with the next."""

import pytest
import torch

from bench.case import DEVICE_DTYPES, DIRECTIONS, Case, Unavailable, discover
from bench.runner import contenders

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases() -> list[Case]:
    return [case for case in discover().values() if case.small or case.shapes[DEVICE]]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
@pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=False)
def test_speed(benchmark, case: Case, direction: str) -> None:
    if direction not in case.directions:
        pytest.skip("the case has no backward")
    shape = case.small or case.shapes[DEVICE][0]
    with torch.set_grad_enabled(direction != "forward"):
        try:
            problem = case.problem(shape, DEVICE, DEVICE_DTYPES[DEVICE][0])
        except Unavailable as reason:
            pytest.skip(str(reason))
        call = contenders({"dlops": problem.dlops}, problem, direction)["dlops"]
        call()

        def run() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = direction
        benchmark(run)
