"""Run every op of an installed dlops on every backend that is available: ``python tests/smoke.py`` from another folder.

The ops and their arguments are those of the contract tests. Every operator that the C++ modules registered for this
machine's device must have run. Needs dlops, numpy and pytest; no other package, and none of the clone but tests/.
"""

import sys
import warnings
from pathlib import Path

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
    device, own = ("cuda", "cuda") if reasons["cuda"] is None else ("cpu", "cpu")
    calls = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for op in OPS:
            for name in op.implementations:
                for dtype in (torch.float32, torch.bfloat16):
                    for args in testing.Make(dtype, device).samples(op):
                        if backend.refusal(op, name, args) is None and args[0].numel() < 5000:
                            testing.check_ratios(op, [args], name)
                            calls += 1
    ran = {event.key for event in profile.key_averages()}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"dlops_{own}::")}
    if not registered or registered - ran:
        return f"not run, of the operators in {' and '.join(modules)}: {', '.join(sorted(registered - ran)) or 'all'}"
    available = ", ".join(name for name, reason in reasons.items() if reason is None)
    print(f"dlops {dlops.__version__} in {Path(dlops.__file__).parent} under torch {torch.__version__}:")
    print(
        f"{len(OPS)} ops, {calls} calls on {available}, {len(registered)} C++ operators; loaded {' and '.join(modules)}"
    )
    return None


if __name__ == "__main__":
    sys.exit(main())
