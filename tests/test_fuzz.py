"""The contract on calls that nobody thought of: random shapes, memory layouts, dtypes and flags of the norm and linear
families, values and gradients, on the backend cpu."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import backend, testing
from dlops.ops.activation import ACTIVATIONS

DRAWS = 12  # of one call's values: few small outputs say little about their largest error
SIZES = st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 33, 0])
PARAMETERS = {"leaky_relu": ["negative_slope"], "elu": ["alpha"], "softplus": ["beta", "threshold"]}


def shapes_of(max_size: int, most: int, min_size: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of at most ``most`` elements."""
    lists = st.lists(SIZES, min_size=min_size, max_size=max_size)
    return lists.map(tuple).filter(lambda shape: math.prod(shape) <= most)


@dataclass
class Layout:
    """A tensor's place in memory; dimensions of stride 0 are expanded."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def place(self, values: Tensor) -> Tensor:
        size = self.offset + 1 + sum(max(n - 1, 0) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        view = values.new_full((size,), 7).as_strided(self.shape, self.strides, self.offset)
        distinct = tuple(slice(0, None if stride else 1) for stride in self.strides)
        view[distinct].copy_(values[distinct])
        return view


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Layout:
    strides, span = [0] * len(shape), 1
    for d in reversed(draw(st.permutations(range(len(shape))))):
        if draw(st.integers(0, 7)) < 7:
            strides[d] = span * draw(st.sampled_from([1, 1, 1, 2])) + draw(st.sampled_from([0, 0, 0, 3]))
            span = strides[d] * max(shape[d], 1)
    return Layout(shape, tuple(strides), draw(st.integers(0, 3)))


@dataclass
class Call:
    """A call of dlops.functional, all but the values."""

    function: str
    dtype: torch.dtype
    inputs: dict[str, Layout]
    options: dict[str, Any]
    grads: list[Layout | None]  # that come in, one for each output; None: nothing flows
    wanted: list[str]  # the inputs that need a gradient

    def results(self, name: str, seed: int, double: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients on backend ``name``, from values rounded to dtype, in it or in float64."""
        generator = torch.Generator().manual_seed(seed)

        def place(layout: Layout) -> Tensor:
            placed = layout.place(torch.randn(layout.shape, generator=generator, dtype=torch.float64).to(self.dtype))
            return placed.double() if double else placed

        inputs = {key: place(layout).requires_grad_(key in self.wanted) for key, layout in self.inputs.items()}
        with dlops.use_backend(name):
            outputs = testing.as_tuple(getattr(F, self.function)(**inputs, **self.options))
            found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
            flowing = [(y, place(dy)) for y, dy in zip(outputs, self.grads, strict=True) if dy and y.requires_grad]
            if flowing:
                outputs, grads = zip(*flowing, strict=True)
                leaves = [inputs[key] for key in self.wanted]
                found |= zip(
                    self.wanted, torch.autograd.grad(outputs, leaves, grads, materialize_grads=True), strict=True
                )
        return found


@st.composite
def calls(
    draw: st.DrawFn,
    function: str,
    shapes: dict[str, tuple[int, ...]],
    options: dict[str, Any],
    outputs: list[tuple[int, ...]],
) -> Call:
    return Call(
        function,
        draw(st.sampled_from(testing.DTYPES)),
        {key: draw(layouts(shape)) for key, shape in shapes.items()},
        options,
        [draw(st.none() | layouts(shape)) if len(outputs) > 1 else draw(layouts(shape)) for shape in outputs],
        [key for key in shapes if draw(st.booleans())],
    )


@st.composite
def norms(draw: st.DrawFn) -> Call:
    shape = draw(shapes_of(min_size=1, max_size=4, most=3000))
    normalized = shape[-draw(st.integers(1, min(2, len(shape)))) :]
    function = draw(st.sampled_from(["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"]))
    shapes = {"input": shape}
    if added := function.startswith("add"):
        shapes["residual"] = shape
    for parameter in ("weight", "bias")[: 1 + function.endswith("layer_norm")]:
        if draw(st.booleans()):
            shapes[parameter] = normalized
    options = {"normalized_shape": list(normalized), "eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3]))}
    return draw(calls(function, shapes, options, [shape] * (1 + added)))


@st.composite
def linears(draw: st.DrawFn) -> Call:
    lead, out, inner = draw(shapes_of(max_size=3, most=100)), draw(SIZES), draw(SIZES)
    function = draw(st.sampled_from(["linear", "linear_act", "gated_linear", "maxout_linear"]))
    pieces = draw(st.integers(1, 4)) if function == "maxout_linear" else 1
    suffixes = ("_gate", "_up") if function == "gated_linear" else ("",)
    shapes = {"input" if function == "linear" else "x": (*lead, inner)}
    shapes |= {f"weight{suffix}": (out * pieces, inner) for suffix in suffixes}
    shapes |= {f"bias{suffix}": (out * pieces,) for suffix in suffixes if draw(st.booleans())}
    options = {"num_pieces": pieces} if function == "maxout_linear" else {}
    if function in ("linear_act", "gated_linear"):
        activation = draw(st.sampled_from(ACTIVATIONS))
        options = {"activation": activation}
        options |= {key: draw(st.sampled_from([0.5, 1.0, 3.0])) for key in PARAMETERS.get(activation, [])}
    return draw(calls(function, shapes, options, [(*lead, out)]))


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(norms() | linears())
def test_random_calls(call: Call) -> None:
    draws = [
        (call.results("cpu", seed), call.results("torch", seed), call.results("torch", seed, double=True))
        for seed in range(DRAWS)
    ]
    for key in draws[0][0]:
        ours, theirs, exact = (
            torch.cat([results[key].flatten() for results in some]) for some in zip(*draws, strict=True)
        )
        assert max(testing.error_ratio(ours, theirs, exact)) <= testing.RATIO, key
