"""The torch-named functions: signatures, and torch's own OpInfo samples and error inputs."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("expecttest")  # which that module of torch imports
from torch.testing._internal.common_methods_invocations import op_db

import dlops
import dlops.functional as F
from dlops.testing import RATIO, error_ratio

# Documented signatures of torch's builtins, which inspect cannot read.
BUILTINS = {
    "linear": "(input, weight, bias=None)",
    "gelu": "(input, approximate='none')",
    "softplus": "(input, beta=1, threshold=20)",
}
OPINFO = {
    "linear": "nn.functional.linear",
    "relu": "nn.functional.relu",
    "leaky_relu": "nn.functional.leaky_relu",
    "elu": "nn.functional.elu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "gelu": "nn.functional.gelu",
    "silu": "nn.functional.silu",
    "hardswish": "nn.functional.hardswish",
    "mish": "nn.functional.mish",
    "softplus": "nn.functional.softplus",
    "rms_norm": "nn.functional.rms_norm",
    "layer_norm": "nn.functional.layer_norm",
}
INFOS = {name: next(i for i in op_db if i.name == of and not i.variant_test_name) for name, of in OPINFO.items()}
COUNTS: Counter[str] = Counter()


@pytest.mark.parametrize("name", OPINFO)
def test_signature_is_torchs(name: str) -> None:
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    if name not in BUILTINS:
        expected = inspect.signature(theirs)
        assert [(p.name, p.default, p.kind) for p in inspect.signature(ours).parameters.values()] == [
            (p.name, p.default, p.kind) for p in expected.parameters.values()
        ]
    elif ours is not theirs:
        parameters = inspect.signature(ours).parameters.values()
        bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert str(bare) == BUILTINS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPINFO)
def test_opinfo_samples(name: str, dtype: torch.dtype, device: str) -> None:
    info = INFOS[name]
    if not info.supports_dtype(dtype, device):
        pytest.skip(f"torch's {name} does not support {dtype} on {device}")
    for forced in (None, "torch"):
        for sample in info.sample_inputs(device, dtype, requires_grad=True):
            args = (sample.input, *sample.args)
            if forced and any(getattr(a, "dtype", dtype) != dtype for a in (*args, *sample.kwargs.values())):
                continue  # mixed dtypes are torch's own to serve
            with dlops.use_backend(forced):
                ours = values_and_gradients(getattr(F, name), args, sample.kwargs)
            theirs = values_and_gradients(getattr(torch.nn.functional, name), args, sample.kwargs)
            COUNTS[name] += 1
            if dtype == torch.float64:
                torch.testing.assert_close(ours, theirs)
                continue
            exact = values_and_gradients(
                getattr(torch.nn.functional, name),
                doubled(args),
                dict(zip(sample.kwargs, doubled(sample.kwargs.values()), strict=True)),
            )
            for y, yd, y64 in zip(ours, theirs, exact, strict=True):
                largest, rms = error_ratio(y, yd, y64)
                assert largest <= RATIO and rms <= RATIO, f"{name}{args}{sample.kwargs}: {largest}, {rms}"


def doubled(values: Any) -> list[Any]:
    return [v.detach().double().requires_grad_(v.requires_grad) if is_float(v) else v for v in values]


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def values_and_gradients(function: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    y = function(*args, **kwargs)
    leaves = [a for a in (*args, *kwargs.values()) if is_float(a) and a.requires_grad]
    if not leaves or not y.requires_grad:
        return [y.detach()]
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", OPINFO)
def test_opinfo_error_inputs(name: str, device: str) -> None:
    if INFOS[name].error_inputs_func is None:
        pytest.skip(f"torch has no error inputs for {name}")
    for case in INFOS[name].error_inputs(device):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
        COUNTS[f"{name} errors"] += 1


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.linear(torch.ones(2, 3), torch.ones(4, 5)),
        lambda f: f.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)),
        lambda f: f.linear(torch.ones(2, 3).long(), torch.ones(4, 3)),
        lambda f: f.linear(torch.ones(600, 300).bfloat16(), torch.ones(400, 300)),
        lambda f: f.linear(torch.ones(600, 300).bfloat16(), torch.ones(400, 301).bfloat16()),
        lambda f: f.layer_norm(torch.ones(300, 300).long(), [300]),
        lambda f: f.layer_norm(torch.ones(300, 300), [301]),
        lambda f: f.layer_norm(torch.ones(300, 300), [300], torch.ones(30)),
        lambda f: f.layer_norm(torch.ones(300, 300), []),
        lambda f: f.rms_norm(torch.ones(300, 300), [300], torch.ones(30)),
        lambda f: f.rms_norm(torch.ones(300, 300), 300),
        lambda f: f.rms_norm([1.0], [1]),
    ],
)
def test_rejects_what_torch_rejects(call: Any) -> None:
    with pytest.raises(Exception) as theirs:
        call(torch.nn.functional)
    with pytest.raises(type(theirs.value)) as ours:
        call(F)
    assert str(ours.value) == str(theirs.value)


def test_mixed_dtypes_as_torch() -> None:
    x, weight = torch.randn(300, 256, dtype=torch.bfloat16), torch.randn(256)
    torch.testing.assert_close(F.layer_norm(x, [256], weight), torch.nn.functional.layer_norm(x, [256], weight))


def test_zz_counts() -> None:
    """A table of how many of torch's samples each function passed (in this process)."""
    for name, count in sorted(COUNTS.items()):
        print(f"{name:20s} {count:5d} OpInfo samples")
