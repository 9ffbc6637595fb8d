"""Run every op of an installed dlops on its C++ kernels: ``python tests/smoke.py`` from another folder.

The ops and their arguments are those of the contract tests. Every operator that the C++ modules registered for this
machine's devices must have run. Needs dlops, numpy and pytest; no other package, and none of the clone but tests/.
"""

import itertools
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: its profiler prints otherwise

import torch

TESTS = Path(__file__).resolve().parent


def main() -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import dlops
    if Path(dlops.__file__).resolve().is_relative_to(TESTS.parent / "dlops"):
        return f"this would test {dlops.__file__}, not the dlops that is installed: run it from another folder"
    from dlops import backend, testing

    sys.path.append(str(TESTS))
    from test_contract import OPS

    reasons = dlops.backends()
    if reasons["cpu"]:
        return f"the backend cpu is missing: {reasons['cpu']}"
    modules = ["dlops._C"]
    if any(Path(dlops.__file__).parent.glob("_cuda.*")) and torch.version.cuda:
        import dlops._cuda  # its symbols must exist in this torch, GPU or not

        modules.append(dlops._cuda.__name__)
    devices = ["cpu"] if reasons["cuda"] else ["cpu", "cuda"]  # and the backends of these names
    calls = [
        (op, device, draws)
        for op, device, dtype in itertools.product(OPS, devices, (torch.float32, torch.bfloat16))
        for draws in zip(*[testing.Make(dtype, device, seed=seed).samples(op) for seed in range(4)], strict=True)
        if backend.refusal(op, device, draws[0]) is None and draws[0][0].numel() < 5000
    ]
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for op, device, draws in calls:
            with dlops.use_backend(device):
                op(*draws[0])
    for op, device, draws in calls:  # not under the profiler, which would keep every step of every definition
        testing.check_ratios(op, draws if draws[0][0].numel() < 1000 else draws[:1], device)
    ran = {event.key for event in profile.key_averages()}
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlops_")}
    operators = {name for name in operators if name.removeprefix("dlops_").partition("::")[0] in devices}
    if not operators or operators - ran:
        return f"not run, of the operators in {' and '.join(modules)}: {', '.join(sorted(operators - ran)) or 'all'}"
    print(f"dlops {dlops.__version__} in {Path(dlops.__file__).parent} under torch {torch.__version__}:")
    print(f"{len(OPS)} ops, {len(calls)} calls, {len(operators)} C++ operators; loaded {' and '.join(modules)}")
    return None


if __name__ == "__main__":
    sys.exit(main())
