"""Run every op of an installed dlops once: ``python tests/smoke.py`` from any other folder, in any environment."""

import sys
import warnings

import torch

warnings.simplefilter("error")
import dlops  # noqa: E402
import dlops.functional as F  # noqa: E402
from dlops._op import registry  # noqa: E402

reason = dlops.backends()["cpu"]
if reason is not None:
    sys.exit(f"the CPU kernels are missing: {reason}")

x, weight, bias = torch.randn(6, 40), torch.randn(24, 40), torch.randn(24)
calls = {
    "linear_act": lambda: F.linear_act(x, weight, bias),
    "gated_linear": lambda: F.gated_linear(x, weight, weight, bias, bias),
    "maxout_linear": lambda: F.maxout_linear(x, weight, bias),
    "rms_norm": lambda: F.rms_norm(x, [40], weight[0]),
    "layer_norm": lambda: F.layer_norm(x, [40], weight[0], weight[1]),
    "add_rms_norm": lambda: F.add_rms_norm(x, x, [40], weight[0])[0],
    "add_layer_norm": lambda: F.add_layer_norm(x, x, [40], weight[0], weight[1])[0],
}
ran = set()
for tensor in (x, weight, bias):
    tensor.requires_grad_()
for call in calls.values():
    gradients = []
    for backend in ("cpu", "torch"):
        with dlops.use_backend(backend):
            y = call()
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        explanation = dlops.explain(
            lambda loss=loss, found=gradients: found.append(
                torch.autograd.grad(loss, [x, weight], allow_unused=True, materialize_grads=True)
            )
        )
        ran |= {decision.op for decision in explanation.decisions}
    torch.testing.assert_close(*gradients)
ran |= set(calls)
missing = set(registry) - ran
if missing:
    sys.exit(f"these ops were not run: {', '.join(sorted(missing))}")
print(f"dlops {dlops.__version__} from {dlops.__file__}: {len(ran)} ops ran under torch {torch.__version__}")
