"""The mechanism that every op shares: what is remembered between calls, and which calls go through the dispatcher."""

from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import _op, backend
from dlops.ops.norm import rms_norm


def backends(op: _op.Op, *args: Any) -> list[str]:
    return [name for name in backend.BACKENDS if backend.refusal(op, name, args) is None]


def test_a_remembered_call_is_still_checked() -> None:
    x = torch.randn(3, 8)
    rms_norm(x, torch.ones(8), 1e-6)
    rms_norm(x, torch.ones(8), 1e-6)
    with pytest.raises(RuntimeError, match="weight has shape"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(RuntimeError, match="weight has dtype"):
        rms_norm(x, torch.ones(8).double(), 1e-6)
    with pytest.raises(ValueError, match="eps"):
        rms_norm(x, torch.ones(8), -1.0)


def test_a_remembered_call_is_still_explained_and_forced() -> None:
    args = (torch.randn(3, 8), torch.ones(8), 1e-6)
    rms_norm(*args)
    assert len(dlops.explain(rms_norm, *args).decisions) == 1
    for name in backends(rms_norm, *args):
        with dlops.use_backend(name):
            rms_norm(*args)
            assert dlops.explain(rms_norm, *args).backend == name
    assert dlops.explain(rms_norm, *args).backend != "vendor"


def test_transforms_are_explained() -> None:
    x = torch.randn(3, 8)
    with dlops.use_backend("cpu"):
        said = dlops.explain(torch.func.vmap(lambda row: rms_norm(row, None, 1e-6)[0]), x)
    (decision,) = said.decisions
    assert decision.backend == "torch" and "torch.func" in decision.reason


def test_one_graph_for_each_forced_backend() -> None:
    """However old torch's compiler is."""
    targets: list[Any] = []

    def record(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        targets.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(F.linear, backend=record, fullgraph=True)
    args = torch.randn(3, 8), torch.randn(4, 8)
    compiled(*args)
    with dlops.use_backend("vendor"):
        compiled(*args)
    compiled(*args)
    assert len(targets) == 2 and torch.ops.dlops.linear_act.default in targets[1]


def test_few_calls_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_REMEMBERED", 4)
    monkeypatch.setattr(rms_norm, "_chosen", {})
    for rows in range(1, 11):
        y, _ = rms_norm(torch.ones(rows, 8), None, 0.0)
        assert y.shape == (rows, 8)
    assert len(rms_norm._chosen) <= 4


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_negated_views(name: str) -> None:
    """torch keeps the sign of a conjugate's imaginary part as a bit, which raw memory does not show."""
    x = torch.randn(5, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    args = (x, torch.ones(8), 1e-6)
    reason = backend.refusal(rms_norm, name, args)
    if reason:
        pytest.skip(reason)
    with dlops.use_backend(name):
        torch.testing.assert_close(rms_norm(*args), rms_norm(x.clone(), *args[1:]))
        torch.testing.assert_close(rms_norm(*args)[0], rms_norm.definition(*args)[0])


class Counting(Tensor):
    """A tensor subclass without its own storage rules: torch's functions return it too."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_the_op() -> None:
    y, _ = rms_norm(torch.randn(3, 8).as_subclass(Counting), torch.ones(8), 1e-6)
    assert isinstance(y, Counting) and Counting.calls > 0


def test_a_value_that_no_schema_takes() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        rms_norm(torch.randn(3, 8), None, {})
