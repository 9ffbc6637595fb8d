"""``python -m bench.train``: a character-level Mamba learns a real text, beside its plain twin on the same batches.

The text is what scikit-learn ships: the descriptions of its datasets, 43,000 characters of English. Both models begin
with the same parameters.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dlops import models
from dlops.models import plain


def text() -> str:
    """The dataset descriptions of scikit-learn, one after another."""
    folder = resources.files("sklearn.datasets") / "descr"
    pages = sorted((path for path in folder.iterdir() if path.name.endswith(".rst")), key=lambda path: path.name)
    return "".join(path.read_text("utf-8") for path in pages)


@dataclass
class Curve:
    """Losses, in nats per character, and seconds of each step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def twins(vocab_size: int, d_model: int = 64, n_layer: int = 2) -> dict[str, nn.Module]:
    """A small model and its plain twin with the same parameters."""
    torch.manual_seed(0)
    ours, theirs = (kind.Mamba(vocab_size, d_model, n_layer) for kind in (models, plain))
    theirs.load_state_dict(ours.state_dict())
    return {"dlops": ours, "plain": theirs}


def train(model: nn.Module, tokens: Tensor, steps: int, done: Callable[[], object] = lambda: None) -> Curve:
    """``steps`` of AdamW on random pieces of the text: 4 of 96 characters, the same for every model."""
    generator, curve = torch.Generator().manual_seed(1), Curve()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 96, (4, 1), generator=generator)
        pieces = tokens[starts + torch.arange(97)]
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.seconds.append(time.perf_counter() - begin)
        curve.losses.append(loss.item())
        done()
    return curve


def both(steps: int) -> dict[str, Curve]:
    """The curves of both models."""
    letters = text()
    vocabulary = {letter: i for i, letter in enumerate(sorted(set(letters)))}
    tokens = torch.tensor([vocabulary[letter] for letter in letters])
    with Progress() as progress:
        curves = {}
        for name, model in twins(len(vocabulary)).items():
            task = progress.add_task(name, total=steps)
            curves[name] = train(model, tokens, steps, lambda task=task: progress.advance(task))
    return curves


def plot(curves: dict[str, Curve], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    steps, clock = figure.subplots(1, 2, sharey=True)
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        steps.plot(curve.losses, style, label=name, linewidth=1)
        clock.plot(torch.tensor(curve.seconds).cumsum(0), curve.losses, style, label=name, linewidth=1)
    steps.set(xlabel="step", ylabel="loss, nats per character", title="by step")
    clock.set(xlabel="seconds", xscale="log", title="by time")
    for axes in (steps, clock):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="F", help="write the curves as PNG")
    args = parser.parse_args()
    curves, console = both(args.steps), Console()
    table = Table("model", "first loss", "last 20 losses, mean", "ms per step, median", box=None, title_justify="left")
    for name, curve in curves.items():
        last, step = torch.tensor(curve.losses[-20:]).mean(), torch.tensor(curve.seconds).median()
        table.add_row(name, f"{curve.losses[0]:.4f}", f"{last:.4f}", f"{1e3 * step:.1f}")
    console.print(table)
    far = max(abs(a - b) / b for a, b in zip(*(c.losses for c in curves.values()), strict=True))
    console.print(f"largest relative difference between the losses of a step: {far:.2g}")
    if args.plot:
        plot(curves, args.plot)
        console.print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
