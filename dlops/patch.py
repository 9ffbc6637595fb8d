"""``patch(model)``: run a model's torch.nn modules on dlops, in place; ``unpatch(model)``: undo it."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module, Parameter

from dlops import nn
from dlops._pairs import Prover, Unproven, activation_of
from dlops.nn.fused import FusedActivation

_REPLACEMENTS: dict[type[Module], type[Module]] = {
    torch.nn.Linear: nn.Linear,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
}
# Modules of Hugging Face's that have mixers of dlops.compat.hugging_face.
_MAMBA = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("mamba", "mamba2", "falcon_mamba", "jamba"))
_SWAPPED_IN = (*_REPLACEMENTS.values(), nn.LinearAct, FusedActivation)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Entry:
    """What became of one module, or of one linear and the activation after it (kind ``"Linear -> gelu"``).

    Args:
        name: the module's name in the model; a fused pair goes by its linear's, a skipped one by its activation's.
        kind: what it is.
        reason: why it was skipped; empty where it was replaced.
    """

    name: str
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`patch` did: iterates over its :class:`Entry` rows; prints as a table of counts and reasons."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.reason)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind were replaced."""
        return dict(Counter(entry.kind for entry in self.replaced))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        lines = [f"dlops.patch: {len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        lines += [f"  replaced {count:4d}  {kind}" for kind, count in self.counts.items()]
        groups: dict[tuple[str, str], list[str]] = {}
        for entry in self.skipped:
            groups.setdefault((entry.kind, entry.reason), []).append(entry.name or "(the model)")
        for (kind, reason), names in groups.items():
            lines.append(f"  skipped  {len(names):4d}  {kind}: {reason} ({names[0]}{', ...' if names[1:] else ''})")
        return "\n".join(lines)


def patch(model: Module) -> Report:
    """Give the supported modules of a model their dlops.nn class, in place.

    torch.nn's ``Linear``, ``LayerNorm`` and ``RMSNorm`` become dlops.nn's, exact types only; a linear whose output
    provably goes to one activation module and nowhere else becomes a :class:`dlops.nn.LinearAct`, and the activation an
    identity. The Mamba mixers of Hugging Face's Mamba, Mamba2, FalconMamba and Jamba become those of
    :mod:`dlops.compat.hugging_face` (transformers 5.21 or newer), for training and for generation from a cache. Nothing
    but the class of a module changes: parameters, buffers, names, state dict, hooks and optimizers stay; the patched
    model pickles, copies, compiles and trains as before. Patching twice does nothing more.

    The proof holds for the model as it is now and for calls that go through the modules' ``forward``. Until
    :func:`unpatch` a fused linear's own output is already activated, and the activation's settings are fixed: code that
    calls that linear by itself, hooks it or wraps it (LoRA, quantization) would see other values. Modules that carry
    hooks are therefore never fused; unpatch before adding hooks or adapters, and patch again after. A patched model can
    be traced, compiled and exported; ``torch.jit.script`` does not take it: unpatch first.

    Args:
        model: any module; shared submodules are handled once.

    Returns:
        what was replaced, and what was skipped and why.

    Raises:
        TypeError: model is not a module.
    """
    _check("patch", model)
    prover = Prover(model, lambda m: type(m) in (torch.nn.Linear, nn.Linear), _fusion_obstacle)
    entries, fused = [], {}
    for activation in tuple(prover.candidates()):
        name, params = activation_of(activation) or ("", {})
        try:
            fused |= dict.fromkeys(prover.prove(activation), (activation, name, params))
        except Unproven as unproven:
            entries.append(Entry(prover.names[activation], f"Linear -> {name}", str(unproven)))
    for linear, name in prover.functions():
        reason = "the activation is a function, not a module whose class can be swapped"
        entries.append(Entry(prover.names[linear], f"Linear -> {name}", reason))
    for linear, (activation, name, params) in fused.items():
        linear.activation, linear.activation_params = name, dict(params)
        _swap(linear, nn.LinearAct)
        if type(activation) is not FusedActivation:
            _swap(activation, FusedActivation)
        entries.append(Entry(prover.names[linear], f"Linear -> {name}"))
    replacements = _replacements(model)
    for module, name in prover.names.items():
        original = vars(module).get("_dlops_original", type(module))
        kind = original if original in replacements else next((b for b in replacements if _resembles(module, b)), None)
        if kind is None or module in fused:
            continue
        reason = _obstacle(module)
        if type(module) is not kind:
            qualified = f"{type(module).__module__}.{type(module).__qualname__}"
            package = kind.__module__.partition(".")[0]
            expected = f"torch.nn.{kind.__name__}" if package == "torch" else f"{package}' {kind.__name__}"
            reason = "is already dlops'" if qualified.startswith("dlops.") else f"{qualified} is not {expected}"
        elif not reason and hasattr(replacements[kind], "obstacle"):
            reason = replacements[kind].obstacle(module)
        if not reason:
            _swap(module, replacements[kind])
        entries.append(Entry(name, kind.__name__, reason or ""))
    return Report(tuple(entries))


def unpatch(model: Module) -> int:
    """Give every module that :func:`patch` changed its own class back, in place; returns how many there were.

    Works on copies and unpickled copies of a patched model too. dlops.nn modules that were built as such stay.

    Raises:
        TypeError: model is not a module.
        RuntimeError: something else changed a module's class since (a parametrization, FSDP); undo that first. Nothing
            has been changed then.
    """
    _check("unpatch", model)
    patched = {name: module for name, module in model.named_modules() if "_dlops_original" in vars(module)}
    for name, module in patched.items():
        if not _swapped_in(type(module)):
            raise RuntimeError(
                f"unpatch: {name or 'the model'} has become a {type(module).__module__}.{type(module).__qualname__} "
                f"since it was patched; undo that first"
            )
    for module in patched.values():
        if type(module) is nn.LinearAct:
            del module.activation, module.activation_params
        module.__class__ = vars(module).pop("_dlops_original")
    return len(patched)


def _check(function: str, model: object) -> None:
    if not isinstance(model, Module):
        received = f"the class {model.__qualname__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"{function}: model must be a torch.nn.Module, an instance; received {received}")


def _replacements(model: Module) -> Mapping[type[Module], Any]:
    """What is swapped for what. transformers is imported by a model that has its mixers, not by dlops."""
    if not any(base.__module__ in _MAMBA for module in model.modules() for base in type(module).__mro__):
        return _REPLACEMENTS
    from dlops.compat import hugging_face

    return _REPLACEMENTS | hugging_face.REPLACEMENTS


def _swapped_in(cls: type[Module]) -> bool:
    hugging_face = sys.modules.get("dlops.compat.hugging_face")
    return cls in _SWAPPED_IN or (hugging_face is not None and cls in hugging_face.REPLACEMENTS.values())


def _swap(module: Module, cls: type[Module]) -> None:
    vars(module).setdefault("_dlops_original", type(module))
    module.__class__ = cls


def _resembles(module: Module, base: type[Module]) -> bool:
    return isinstance(module, base) or type(module).__name__.endswith(base.__name__)


def _obstacle(module: Module) -> str | None:
    """Why a module of a supported type is not an ordinary one."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    return None


def _fusion_obstacle(module: Module) -> str | None:
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks, which would see other values"
    if isinstance(module, torch.nn.Linear) and {"activation", "activation_params"} & vars(module).keys():
        return "it has an attribute of the name 'activation' already"
    return _obstacle(module)
