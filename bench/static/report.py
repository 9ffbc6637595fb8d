"""The report of the static gates: a table for the terminal, rows for JSON."""

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.static.check import Report

COLUMNS = (
    "kernel",
    "configuration",
    "chip",
    "registers",
    "spills",
    "shared memory",
    "occupancy",
    "instructions of note",
)


def show(report: Report, console: Console) -> None:
    """Print every row, what was not checked, and what failed."""
    table = Table(*COLUMNS, box=None, header_style="bold")
    for column in table.columns[3:7]:
        column.justify = "right"
    for facts in report.facts:
        row = facts.row() | {"occupancy": f"{facts.occupancy:.0%}"}
        table.add_row(*(escape(str(cell)) for cell in row.values()), style="red" if facts.failures() else None)
    console.print(table)
    chips = Counter(str(facts.chip) for facts in report.facts)
    counts = ", ".join(f"{count} for {chip}" for chip, count in sorted(chips.items()))
    console.print(f"{len({f.kernel for f in report.facts})} kernels, {len(report.facts)} compiled: {counts}")
    if report.nvcc_seconds:
        console.print(f"nvcc took {report.nvcc_seconds:.0f} s")
    for line in report.unchecked:
        console.print(line, style="yellow", markup=False)
    failures = report.failures()
    for failure in failures:
        console.print(f"FAILED {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        console.print(f"{len(failures)} failed", style="bold red")


def saved(path: Path) -> bool:
    """Whether the file is empty or holds rows that :func:`save` wrote."""
    text = path.read_text()
    return not text.strip() or text.startswith('[\n{"kernel": ')


def save(report: Report, path: Path) -> None:
    """One object per row, one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(facts.row()) for facts in report.facts) + "\n]\n")
