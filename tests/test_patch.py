"""patch and unpatch: what is swapped, what is fused, what is left alone, and that nothing else changes."""

import contextlib
import copy
import functools
import gc
import io
import itertools
import numbers
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dlops
from dlops.nn.fused import FusedActivation
from dlops.patch import Report, patch, unpatch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


class FeedForward(nn.Module):
    """The plain case; the variants below differ in the forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.drop = nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.act(self.fc(self.norm(x)))))


# Feed-forwards to fuse


class Settings(FeedForward):
    """Optional arguments and modes that do not change what becomes of the linear's output; a helper method."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scaled: bool = False) -> Tensor:
        x = self.hidden(x) if mask is None else self.hidden(x) * mask
        if self.training or scaled:
            x = x * 2
        return self.out(x)

    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class Keeps(FeedForward):
    """Stores its result, which a trace must not leave behind; and reads the weight of the linear."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.act(self.fc(x)) + self.fc.weight.sum()
        return self.out(self.last)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(2)])
        self.acts = nn.ModuleDict({"relu": nn.ReLU(inplace=True)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.acts["relu"](layer(x))
        for block in self.blocks:
            x = block(x)
        return x


class Sink:
    def __init__(self, layer: object) -> None:
        self.layer = layer


class Monitored(nn.Module):
    """Holds its modules in what no forward uses, as a trainer's back reference does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.monitor = Sink([self.net])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def sequential(*activations: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(module for act in activations for module in (nn.Linear(8, 8), act)))


def one_activation() -> nn.Sequential:
    act = nn.Tanh()
    return sequential(act, act)


def tied() -> nn.Sequential:
    model = sequential(nn.Mish(), nn.Sigmoid())
    model[2].weight = model[0].weight
    return model


TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}


def bert(act: str) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TINY, hidden_act=act))


def bert_intermediate() -> nn.Module:
    return bert("gelu").encoder.layer[0].intermediate


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**TINY, attn_implementation="eager"))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, drop_rate=0.1)


FLOATS = lambda: torch.randn(3, 8)  # noqa: E731
TOKENS = lambda: torch.randint(16, (2, 5))  # noqa: E731
IMAGES = lambda: torch.randn(2, 3, 8, 8)  # noqa: E731

PLAIN = {"Linear -> gelu": 1, "LayerNorm": 1, "Linear": 1}
BERT = {"Linear -> tanh": 1, "Linear": 10, "LayerNorm": 5}


def nested() -> nn.Module:
    return nn.Sequential(FeedForward(), sequential(nn.ReLU()))


def norms() -> nn.Module:
    return nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8, bias=False))


# name: (model, input, replaced per kind)
FUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, int]]] = {
    "feed-forward": (FeedForward, FLOATS, PLAIN),
    "settings": (Settings, FLOATS, PLAIN),
    "lists": (Lists, FLOATS, {"Linear -> silu": 2, "Linear -> relu": 2}),
    "one activation for two": (one_activation, FLOATS, {"Linear -> tanh": 2}),
    "tied weights": (tied, FLOATS, {"Linear -> mish": 1, "Linear -> sigmoid": 1}),
    "nested": (nested, FLOATS, {**PLAIN, "Linear -> relu": 1}),
    "monitored": (Monitored, FLOATS, {"Linear -> gelu": 1}),
    "norms": (norms, FLOATS, {"RMSNorm": 1, "LayerNorm": 1}),
    "BertIntermediate": (bert_intermediate, FLOATS, {"Linear -> gelu": 1}),
    "Bert": (lambda: bert("gelu"), TOKENS, {**BERT, "Linear -> gelu": 2}),
    "Bert gelu_new": (lambda: bert("gelu_new"), TOKENS, {**BERT, "Linear -> gelu_tanh": 2}),
    "Llama": (llama, TOKENS, {"Linear -> silu": 2, "Linear": 12}),
    "timm ViT": (vit, IMAGES, {"Linear -> gelu": 2, "Linear": 7}),
}
ACTIVATIONS = [
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.SiLU(inplace=True),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.LeakyReLU(0.3),
    nn.ELU(alpha=0.7),
    nn.Mish(),
    nn.Hardswish(),
    nn.Softplus(beta=2.0, threshold=1.0),
]
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
                  "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
                  "mish": "mish", "relu2": "relu2", "silu": "silu", "swish": "silu", "relu": "relu"}  # fmt: skip

# Lookalikes


def variant(forward: Callable[..., object], **methods: Callable[..., object]) -> Callable[[], nn.Module]:
    """A FeedForward class with another forward."""
    return type("Variant", (FeedForward,), {"forward": forward, **methods})


def store(self: FeedForward, x: Tensor) -> Tensor:
    self.hidden = self.fc(x)
    return self.act(self.hidden)


class ReachesIn(nn.Module):
    """Calls the linear of its child by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x) + self.ff.fc(x)


class ReachesInByName(ReachesIn):
    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x) + self.get_submodule("ff.fc")(x)


class Iterates(nn.Module):
    """Taps a Sequential's intermediate values, in a forward that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = [x] if x.sum() > 1e9 else []
        for module in self.net:
            taps.append(x := module(x))
        return taps


class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.b = nn.Sequential(self.a[0], nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def run_inside(model: nn.Module, x: Tensor) -> Tensor:
    return model.net[0](x) + model.net(x)


class PassesItselfOn(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        return run_inside(self, x)


class FindsChildren(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        inner = next(iter(self.children()))
        return inner[0](x) + inner(x)


class Stashes(Iterates):
    def __init__(self) -> None:
        super().__init__()
        self.taps = [self.net[0]]

    def forward(self, x: Tensor) -> Tensor:
        return self.taps[0](x) + self.net(x)


class Slots:
    __slots__ = ("layer",)

    def __init__(self, layer: object) -> None:
        self.layer = layer


class Tap(Iterates):
    """Calls the linear through something that is no module."""

    def __init__(self, hide: Callable[[nn.Module], object], take: Callable[..., Tensor]) -> None:
        super().__init__()
        self.probe, self.take = hide(self), take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.probe, x) + self.net(x)


class TapBeside(nn.Module):
    """The one that calls it does not contain it."""

    def __init__(self) -> None:
        super().__init__()
        self.tap, self.net = Tap(lambda _: None, lambda probe, x: probe.layer(x)), sequential(nn.GELU())
        self.tap.net, self.tap.probe = nn.Identity(), Sink(self.net[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(x) + self.net(x)


def hidden_of(feed_forward: FeedForward, x: Tensor) -> Tensor:
    return feed_forward.fc(x)


class Helped(nn.Module):
    """A function takes the linear's output from outside the module that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return hidden_of(self.ff, x) + self.ff(x)


TAPS: list[nn.Module] = []


class TapsGlobal(Iterates):
    def __init__(self) -> None:
        super().__init__()
        TAPS[:] = [self.net[0]]

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(x) + self.net(x)

    def tap(self, x: Tensor) -> Tensor:
        return (lambda y: TAPS[0](y))(x)


def swallows(self: FeedForward, x: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        if x.sum() < 1e9:
            return self.fc(x)
    return self.act(self.fc(x))


def catches(self: FeedForward, x: Tensor) -> Tensor:
    try:
        return self.fc(x) if float(x.sum()) < 1e9 else x
    except Exception:
        return self.act(self.fc(x))


def catches_all(self: FeedForward, x: Tensor) -> Tensor:
    try:
        return self.fc(x) if range(x.size(0)) else x
    except:  # noqa: E722
        return self.act(self.fc(x))


def catches_a_missing_attribute(self: FeedForward, x: Tensor) -> Tensor:
    try:
        return self.act(self.fc(x.sequence.data()))
    except AttributeError:
        return self.fc(x)


class Muffled:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> bool:
        return True


def muffles(self: FeedForward, x: Tensor) -> Tensor:
    with Muffled():
        return self.fc(x) if float(x.ndim) else x
    return self.act(self.fc(x))


@functools.singledispatch
def is_dispatched(x: object) -> bool:
    return False


is_dispatched.register(Tensor, lambda x: True)


def with_generator(forward: Callable[..., object], make: Callable[[], object]) -> Callable[[], nn.Module]:
    """A FeedForward that holds a random number generator of its own."""

    def build() -> nn.Module:
        model = variant(forward)()
        model.generator = make()
        return model

    return build


GENERATOR = random.Random(0)


def without_gradient(self: FeedForward, x: Tensor) -> Tensor:
    h = self.fc(x)
    with torch.no_grad():
        gate = self.act(h)
    return gate * self.out(x)


def with_autocast(self: FeedForward, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = self.fc(x)
    return self.act(h).float()


def matches(self: FeedForward, x: Tensor) -> Tensor:
    match x:
        case Tensor():
            return self.fc(x)
        case _:
            return self.act(self.fc(x))


def overridden() -> nn.Module:
    model = FeedForward()
    model.forward = lambda x: (h := model.fc(x)) + model.act(h)
    return model


def hooked(which: str, register: str) -> nn.Module:
    model = FeedForward()
    getattr(getattr(model, which), register)(lambda *_: None)
    return model


# name: (model, what the reason says)
LOOKALIKES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout between": (variant(lambda self, x: self.act(self.drop(self.fc(x)))), "input comes from Dropout"),
    "dropout between in Sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.GELU()), "Dropout"),
    "residual": (variant(lambda self, x: self.act(h := self.fc(x)) + h), "also used by .*add"),
    "scaled between": (variant(lambda self, x: self.act(self.fc(x).mul_(2))), "input comes from mul_"),
    "tap": (variant(lambda self, x: (self.act(h := self.fc(x)), h)), "also used by the result"),
    "stored tap": (variant(store), "keeps the linear's output"),
    "reused linear": (variant(lambda self, x: self.act(self.fc(self.act(self.fc(x))))), "called more than once"),
    "activation elsewhere": (variant(lambda self, x: self.act(self.fc(x)) + self.act(x)), "from an argument"),
    "two activations": (variant(lambda self, x: self.act(self.act(self.fc(x)))), "input comes from GELU"),
    "in training": (variant(lambda self, x: self.act(h := self.fc(x)) + (h if self.training else 0)), "also used by"),
    "in evaluation": (variant(lambda self, x: self.act(h := self.fc(x)) + (0 if self.training else h)), "also used by"),
    "no mask": (variant(lambda self, x, m=None: self.act(h := self.fc(x)) + (h if m is None else m)), "also used by"),
    "mask": (variant(lambda self, x, m=None: self.act(h := self.fc(x)) + (0 if m is None else h)), "also used by"),
    "on request": (variant(lambda self, x, tap=False: self.act(h := self.fc(x)) + (h if tap else 0)), "also used by"),
    "data": (variant(lambda self, x: self.act(self.fc(x)) if x.sum() > 0 else self.fc(x)), "cannot be traced"),
    "chance": (variant(lambda self, x: self.act(self.fc(x) if random.random() < 0.99 else x)), "random numbers"),
    "chance of torch": (
        variant(lambda self, x: self.act(self.fc(x) if torch.rand(()) < 0.99 else x)),
        "random numbers",
    ),
    "kind of input": (
        variant(lambda self, x: self.fc(x) if isinstance(x, Tensor) else self.act(self.fc(x))),
        "isinstance of a tensor",
    ),
    "matched kind of input": (variant(matches), "isinstance of a tensor"),
    "type of input": (variant(lambda self, x: self.fc(x) if type(x) is Tensor else self.act(self.fc(x))), r"type\(\)"),
    "attribute of input": (variant(lambda self, x: self.act(self.fc(x)) if hasattr(x, "b") else self.fc(x)), "hasattr"),
    "value of an argument": (
        variant(lambda self, x, m=None: self.act(self.fc(x)) if m is not True else self.fc(x)),
        "what an argument is",
    ),
    "swallowed": (variant(swallows), "the values of its input"),
    "gradients on": (variant(lambda self, x: self.act(h := self.fc(x)) + h * torch.is_grad_enabled()), "also used by"),
    "autocast": (
        variant(lambda self, x: self.act(self.fc(x)) if torch.is_autocast_enabled("cpu") else self.fc(x)),
        "is_autocast_enabled",
    ),
    "parent passes itself on": (PassesItselfOn, "calls net.0 itself"),
    "parent finds children": (FindsChildren, "calls net.0 itself"),
    "text of an attribute": (
        variant(lambda self, x: self.fc(x) if str(x.dtype) == "torch.float32" else self.act(self.fc(x))),
        "as text",
    ),
    "formatted attribute": (
        variant(lambda self, x: self.fc(x) if "float32" in f"{x.dtype}" else self.act(self.fc(x))),
        "as text",
    ),
    "looked-up attribute": (
        variant(lambda self, x: self.fc(x) if {torch.float32: 1}.get(x.dtype) else self.act(self.fc(x))),
        "as a key",
    ),
    "attribute in a set": (
        variant(lambda self, x: self.fc(x) if x.dtype in {torch.float32} else self.act(self.fc(x))),
        "as a key",
    ),
    "attribute as a key": (
        variant(lambda self, x: self.fc(x) if torch.float32 in {x.dtype: 1} else self.act(self.fc(x))),
        "as a key",
    ),
    "kind of attribute": (
        variant(lambda self, x: self.fc(x) if isinstance(x.ndim, int) else self.act(self.fc(x))),
        "isinstance of a tensor",
    ),
    "abstract kind of attribute": (
        variant(lambda self, x: self.fc(x) if isinstance(x.ndim, numbers.Number) else self.act(self.fc(x))),
        "isinstance of a tensor",
    ),
    "dispatched kind of input": (
        variant(lambda self, x: self.fc(x) if is_dispatched(x) else self.act(self.fc(x))),
        "isinstance of a tensor",
    ),
    "is_tensor": (variant(lambda self, x: self.fc(x) if torch.is_tensor(x) else self.act(self.fc(x))), "is_tensor"),
    "default of getattr": (
        variant(lambda self, x: self.fc(x) if getattr(x, "lengths", None) is None else self.act(self.fc(x))),
        "has an attribute lengths",
    ),
    "attribute that is often None": (
        variant(lambda self, x: self.fc(x) if x.grad is None else self.act(self.fc(x))),
        "has an attribute grad",
    ),
    "kind that torch answers": (
        variant(lambda self, x: self.act(self.fc(x)) if isinstance(x, nn.Parameter) else self.fc(x)),
        "isinstance of a tensor",
    ),
    "unnamed option": (
        variant(lambda self, x, **options: self.fc(x) if options.get("tap") is None else self.act(self.fc(x))),
        "does not name",
    ),
    "missing attribute": (variant(catches_a_missing_attribute), "an exception that it catches"),
    "caught": (variant(catches), "the values of its input|an exception that it catches"),
    "caught by all": (variant(catches_all), "the values of its input"),
    "muffled": (variant(muffles), "the values of its input"),
    "chance of numpy": (variant(lambda self, x: self.act(self.fc(x) if np.random.rand() < 1 else x)), "random numbers"),
    "chance of a generator": (
        with_generator(
            lambda self, x: self.act(self.fc(x) if torch.rand((), generator=self.generator) < 1 else x),
            lambda: torch.Generator().manual_seed(0),
        ),
        "random numbers",
    ),
    "chance of numpy's generator": (
        with_generator(
            lambda self, x: self.act(self.fc(x) if self.generator.random() < 1 else x),
            lambda: np.random.default_rng(0),
        ),
        "random numbers",
    ),
    "chance of a global": (
        variant(lambda self, x: self.act(self.fc(x) if GENERATOR.random() < 1 else x)),
        "random numbers",
    ),
    "activation without gradient": (variant(without_gradient), "are switched between"),
    "linear under autocast": (variant(with_autocast), "are switched between"),
    "linear in an object": (lambda: Tap(lambda m: Sink(m.net[0]), lambda p, x: p.layer(x)), "Tap.probe holds net.0"),
    "linear in slots": (lambda: Tap(lambda m: Slots(m.net[0]), lambda p, x: p.layer(x)), "Tap.probe holds net.0"),
    "linear in a closure": (lambda: Tap(lambda m: lambda x: m.net[0](x), lambda p, x: p(x)), "Tap.probe holds net"),
    "linear in a listed closure": (
        lambda: Tap(lambda m: [lambda x: m.net[0](x)], lambda p, x: p[0](x)),
        "Tap.probe holds net",
    ),
    "linear in a partial": (
        lambda: Tap(lambda m: functools.partial(m.net[0]), lambda p, x: p(x)),
        "Tap.probe holds net",
    ),
    "method of the linear": (lambda: Tap(lambda m: m.net[0].forward, lambda p, x: p(x)), "Tap.probe holds net"),
    "weak reference": (lambda: Tap(lambda m: weakref.ref(m.net[0]), lambda p, x: p()(x)), "Tap.probe holds net.0"),
    "function that calls it": (Helped, "Helped.forward calls ff.fc itself"),
    "linear in an object beside": (TapBeside, "Tap.probe holds net.0"),
    "linear in a global": (TapsGlobal, "TapsGlobal.tap holds net.0"),
    "parent keeps the linear": (Stashes, "Stashes.taps holds net.0 too"),
    "two methods": (variant(FeedForward.forward, embed=lambda self, x: self.fc(x)), "several methods"),
    "function": (variant(lambda self, x: nn.functional.gelu(self.fc(x))), "is a function"),
    "parent reaches in": (ReachesIn, "ReachesIn.forward calls ff.fc itself"),
    "parent reaches in by name": (ReachesInByName, "calls ff.fc itself|cannot be traced"),
    "parent iterates": (Iterates, "cannot be traced"),
    "shared linear": (SharedLinear, "called by 2 modules"),
    "overridden parent": (overridden, "overridden on the instance"),
    "hook on the linear": (lambda: hooked("fc", "register_forward_hook"), "hooks"),
    "backward hook on the linear": (lambda: hooked("fc", "register_full_backward_hook"), "hooks"),
    "hook on the activation": (lambda: hooked("act", "register_forward_pre_hook"), "hooks"),
}


def run(model: nn.Module, x: Tensor, **arguments: object) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all parameters, from a fixed seed."""
    torch.manual_seed(1)
    random.seed(1)
    result = model(x, **arguments)
    outputs = [result] if isinstance(result, Tensor) else [y for y in tuple(result) if isinstance(y, Tensor)]
    if isinstance(result, transformers.utils.ModelOutput):
        outputs = [y for y in result.values() if isinstance(y, Tensor)]
    loss = torch.stack([(y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs]).sum()
    return outputs, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def assert_same(model: nn.Module, reference: nn.Module, x: Tensor, **arguments: object) -> None:
    for training in (False, True):
        actual, expected = run(model.train(training), x, **arguments), run(reference.train(training), x, **arguments)
        torch.testing.assert_close(actual, expected)


def inventory(model: nn.Module) -> dict[str, tuple[type, frozenset[str]]]:
    """The type and instance attributes of every module."""
    return {name: (type(module), frozenset(vars(module))) for name, module in model.named_modules()}


def fused(report: Report) -> list[str]:
    return [entry.kind for entry in report.replaced if "->" in entry.kind]


@pytest.mark.parametrize("name", FUSED)
def test_patched_model_is_the_same_model(name: str) -> None:
    build, make, counts = FUSED[name]
    model, x = build(), make()
    reference, before, state = copy.deepcopy(model), inventory(model), dict(model.state_dict(keep_vars=True))
    report = patch(model)
    assert report.counts == counts, str(report)
    assert_same(model, reference, x)
    assert all(value is state[key] for key, value in model.state_dict(keep_vars=True).items())
    assert model.state_dict().keys() == state.keys()

    patched = inventory(model)
    assert not patch(model).replaced, "a second patch has nothing to do"
    assert inventory(model) == patched
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert unpatch(model) > 0
    unpatch(reference)
    for m in (model, *copies):
        if m is not model:
            assert {k: v[0] for k, v in inventory(m).items()} == {k: v[0] for k, v in patched.items()}
            assert_same(m, reference, x)
            unpatch(m)
        assert inventory(m) == before
        assert_same(m, reference, x)
    assert unpatch(model) == 0


def test_optional_arguments_of_a_fused_parent() -> None:
    model = Settings()
    reference = copy.deepcopy(model)
    assert fused(patch(model)) == ["Linear -> gelu"]
    assert_same(model, reference, torch.randn(3, 8), mask=torch.randn(3, 8), scaled=True)


def test_callbacks_of_the_garbage_collector_are_not_the_forward() -> None:
    def catches(phase: str, info: dict[str, int]) -> None:
        try:
            info["missing"]
        except KeyError:
            calls.append(phase)

    calls: list[str] = []
    gc.callbacks.append(catches)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        assert fused(patch(FeedForward())) == ["Linear -> gelu"]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(catches)
    assert calls
    assert gc.isenabled()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_in_sequential(activation: nn.Module) -> None:
    model = sequential(copy.deepcopy(activation), copy.deepcopy(activation))
    reference = copy.deepcopy(model)
    report = patch(model)
    assert len(fused(report)) == len(report) == 2
    assert [type(module) for module in model] == [dlops.nn.LinearAct, FusedActivation] * 2
    assert type(activation).__name__ in repr(model)
    assert_same(model, reference, torch.randn(5, 8) * 2)


@pytest.mark.parametrize("name", HF_ACTIVATIONS)
def test_transformers_activations(name: str) -> None:
    model = sequential(transformers.activations.ACT2FN[name])
    reference = copy.deepcopy(model)
    assert fused(patch(model)) == [f"Linear -> {HF_ACTIVATIONS[name]}"]
    assert_same(model, reference, torch.randn(5, 8) * 2)


@pytest.mark.parametrize("act", [nn.CELU(), nn.GLU(), nn.Softmax(-1), transformers.activations.QuickGELUActivation()])
def test_other_activations_are_left_alone(act: nn.Module) -> None:
    model = sequential(act)
    assert patch(model).counts == {"Linear": 1}
    assert type(model[1]) is type(act)


def test_timm_mlp_with_dropout_after() -> None:
    model = timm.layers.Mlp(8, 16, drop=0.2)
    reference = copy.deepcopy(model)
    assert patch(model).counts == {"Linear -> gelu": 1, "Linear": 1}
    assert type(model.fc1) is dlops.nn.LinearAct
    assert_same(model, reference, torch.randn(2, 3, 8))


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_left_alone(name: str) -> None:
    build, reason = LOOKALIKES[name]
    model, x = build(), torch.randn(3, 8)
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    expected = [run(model.train(training), x) for training in (False, True)]
    others = {n: t for n, t in inventory(model).items() if t[0] not in (nn.Linear, nn.LayerNorm)}
    report = patch(model)
    assert not fused(report), str(report)
    (entry,) = [e for e in report.skipped if "->" in e.kind]
    assert re.search(reason, entry.reason), entry
    assert all(type(linear) is dlops.nn.Linear for linear in linears)
    assert {n: t for n, t in inventory(model).items() if n in others} == others
    torch.testing.assert_close([run(model.train(training), x) for training in (False, True)], expected)


def test_unpatch_refuses_what_changed_since() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    patch(model)
    parametrizations.weight_norm(model[0])
    x = torch.randn(2, 8)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"0 has become a .*Parametrized.*undo that first"):
        unpatch(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert type(model[2]) is dlops.nn.Linear
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert unpatch(model) == 3
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("size", [8, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(size: int, dtype: torch.dtype) -> None:
    """The second layer's input has the context's dtype, its weight has float32."""
    model = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size), nn.ReLU(), nn.LayerNorm(size))
    reference, x = copy.deepcopy(model), torch.randn(size, size)
    assert len(fused(patch(model))) == 2
    with torch.autocast("cpu", dtype):
        actual, expected = run(model, x), run(reference, x)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() < 0.05 * theirs.float().norm()


def test_recorded_as_torch_functions() -> None:
    """torch.fx and torch.jit.trace see the functions of a model that was not patched."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(4, 8)
    patch(model)
    assert "gelu(" in torch.fx.symbolic_trace(model).code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    assert "aten::gelu" in str(traced.inlined_graph)
    assert "dlops::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


def test_tracing_leaves_no_trace() -> None:
    model = Keeps()
    model(torch.randn(3, 8))
    last, state = model.last, (random.getstate(), torch.get_rng_state(), np.random.get_state())
    assert fused(patch(model)) == ["Linear -> gelu"]
    assert model.last is last
    assert model.training
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    for chance in (LOOKALIKES["chance"][0](), LOOKALIKES["chance of numpy"][0]()):
        patch(chance)
        assert random.getstate() == state[0]
        np.testing.assert_equal(np.random.get_state(), state[2])
        assert chance.training


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Quantised(nn.Parameter):
    pass


def test_only_ordinary_modules_of_the_exact_type_are_swapped() -> None:
    overridden, quantised = nn.Linear(2, 2), nn.Linear(2, 2)
    overridden.forward = lambda x: x
    quantised.weight = Quantised(torch.zeros(2, 2))
    model = nn.ModuleDict(
        {
            "subclass": MyLinear(2, 2),
            "overridden": overridden,
            "quantised": quantised,
            "parametrized": parametrizations.weight_norm(nn.Linear(2, 2)),
            "lazy": nn.LazyLinear(2),
            "namesake": RMSNorm(),
            "own": dlops.nn.Linear(2, 2),
            "plain": nn.Linear(2, 2),
            "conv": nn.Conv1d(1, 1, 1),
        }
    )
    before = inventory(model)
    report = patch(model)
    assert [entry.name for entry in report.replaced] == ["plain"]
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert set(reasons) == set(model) - {"plain", "conv"}
    assert "MyLinear is not torch.nn.Linear" in reasons["subclass"]
    assert "overridden" in reasons["overridden"]
    assert reasons["quantised"] == "its weight is a Quantised"
    assert "RMSNorm is not torch.nn.RMSNorm" in reasons["namesake"]
    assert "already" in reasons["own"]
    after = inventory(model)
    assert {name for name in before if before[name][0] is not after[name][0]} == {"plain"}
    assert unpatch(model) == 1
    assert inventory(model) == before


def test_the_reason_names_a_module_without_children() -> None:
    report = patch(nn.Sequential(nn.Sequential(), nn.Linear(8, 8), nn.Sequential(), nn.ReLU()))
    assert "input comes from Sequential" in report.skipped[0].reason


@pytest.mark.parametrize("do", [patch, unpatch])
@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Linear(8, 8)]], ids=["None", "class", "list"])
def test_only_a_module_can_be_patched(do: Callable[[object], object], model: object) -> None:
    received = {type(None): "a NoneType", type: "the class Linear", list: "a list"}[type(model)]
    with pytest.raises(TypeError, match=f"^{do.__name__}: model must be a torch.nn.Module.*received {received}$"):
        do(model)


def test_work_is_linear_in_the_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    look_ups, get = [], nn.Module.get_submodule
    monkeypatch.setattr(nn.Module, "get_submodule", lambda self, target: look_ups.append(target) or get(self, target))

    def count(pairs: int) -> int:
        look_ups.clear()
        assert len(fused(patch(sequential(*(nn.ReLU() for _ in range(pairs)))))) == pairs
        return len(look_ups)

    assert count(16) <= 2 * count(8)


def test_report_prints_counts_and_reasons() -> None:
    dropout = LOOKALIKES["dropout between"][0]
    report = patch(nn.Sequential(FeedForward(), dropout(), dropout()))
    assert len(list(report)) == len(report) == len(report.replaced) + len(report.skipped)
    text = str(report)
    assert text.startswith("dlops.patch: 9 replaced, 2 skipped")
    assert "1  Linear -> gelu\n" in text
    assert "2  Linear -> gelu: the activation's input comes from Dropout, not from a Linear (1.act, ...)" in text


def test_a_model_that_is_one_module() -> None:
    model = nn.Linear(3, 4)
    assert dlops.patch(model).counts == {"Linear": 1}
    assert type(model) is dlops.nn.Linear
    dlops.unpatch(model)
    assert type(model) is nn.Linear


def test_shared_modules_are_handled_once() -> None:
    block = FeedForward()
    model = nn.Sequential(block, block)
    reference = copy.deepcopy(model)
    assert len(patch(model)) == 3
    assert_same(model, reference, torch.randn(3, 8))
    assert unpatch(model) == 4


def test_hooks_stay_and_fire() -> None:
    model, seen = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), []
    for module in model:
        module.register_forward_hook(lambda m, args, y: seen.append(type(m)))
        module.register_full_backward_hook(lambda m, dx, dy: seen.append(type(m)))
    patch(model)
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == [dlops.nn.Linear, dlops.nn.LayerNorm, dlops.nn.LayerNorm, dlops.nn.Linear]


def test_a_pair_is_fused_once_its_hooks_are_gone() -> None:
    model = FeedForward()
    hook = model.fc.register_forward_hook(lambda *_: None)
    before = inventory(model)
    assert not fused(patch(model))
    hook.remove()
    assert patch(model).counts == {"Linear -> gelu": 1}
    unpatch(model)
    assert inventory(model) == before


def test_optimizer_continues() -> None:
    model = FeedForward()
    reference = copy.deepcopy(model)
    x = torch.randn(16, 8)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, reference)]

    def step() -> None:
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            torch.manual_seed(2)
            optimizer.zero_grad()
            (m(x) - 1).square().mean().backward()
            optimizer.step()

    step()
    patch(model)
    step()
    unpatch(model)
    step()
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_pickle_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = nn.Sequential(bert_intermediate(), sequential(nn.ELU(0.5)), nn.LayerNorm(8)), torch.randn(2, 8)
    model[1][0] = nn.Linear(16, 8)
    expected = model(x)
    assert len(fused(patch(model))) == 2
    torch.save((model, x, expected), tmp_path / "model.pt")
    script = """
import sys, torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert type(model[1][0]).__name__ == "LinearAct"
torch.testing.assert_close(model(x), expected)
import dlops
assert dlops.unpatch(model) == 5
assert type(model[1][0]) is torch.nn.Linear and type(model[0].intermediate_act_fn).__name__ == "GELUActivation"
torch.testing.assert_close(model(x), expected)
"""
    paths = [str(Path(dlops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, env=environment)


def test_state_dict_loads_both_ways() -> None:
    model, plain = FeedForward(), FeedForward()
    patch(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    plain.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), strict=True)
    assert_same(model, plain, torch.randn(3, 8))
    model.load_state_dict(FeedForward().state_dict(), strict=True)


def test_patched_model_compiles_without_graph_breaks() -> None:
    model = FeedForward()
    expected = run(model, x := torch.randn(3, 8))
    patch(model)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager"), x), expected)
