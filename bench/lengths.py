"""``python -m bench.lengths``: how the time of the selective scan grows with the length of the sequence."""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import measure
from bench.case import DIRECTIONS, select
from bench.runner import contenders

LENGTHS = [1 << n for n in range(8, 16)]


def times(device: str, dim: int = 1536, dstate: int = 16) -> dict[str, list[float]]:
    """Milliseconds by direction, one per length."""
    (scan,) = select(["selective_scan"])
    found: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
    for length in track(LENGTHS, "measuring"):
        for direction in DIRECTIONS:
            with torch.set_grad_enabled(direction != "forward"):
                problem = scan.problem((1, dim, length, dstate), device, "float32")
                calls = contenders({"dlops": problem.dlops}, problem, direction)
                calls["dlops"]()
                found[direction].append(measure.median(measure.rounds(calls, device, 1.0)["dlops"]))
    return found


def plot(found: dict[str, list[float]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for direction, ms in found.items():
        (line,) = axes.plot(LENGTHS, ms, "o-", label=direction)
        linear = [ms[-1] * length / LENGTHS[-1] for length in LENGTHS]
        axes.plot(LENGTHS, linear, ":", color=line.get_color(), label="in proportion to L")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="L, steps", ylabel="ms", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.lengths", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="F", help="write the times as PNG")
    args = parser.parse_args()
    found, console = times(args.device), Console()
    table = Table("L", *(f"{direction}, ms (us per step)" for direction in found), box=None)
    for i, length in enumerate(LENGTHS):
        table.add_row(str(length), *(f"{ms[i]:.3g} ({1e3 * ms[i] / length:.1f})" for ms in found.values()))
    console.print(table)
    if args.plot:
        plot(found, f"selective_scan, B1 D1536 N16, {measure.machine(args.device)['name']}", args.plot)
        console.print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
