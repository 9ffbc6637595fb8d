"""Tables for the terminal, for Markdown and for HTML, and plots: all from stored rows."""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.case import Case
from bench.rows import Row, Run, missing, rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SLOWER = "<1"  # flags a row in which dlops is slower than eager
CONTENDERS = ("dlops", "eager", "compile")
_CSS = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;
text-align:right;white-space:nowrap}td:nth-child(-n+5),th:nth-child(-n+5){text-align:left}
tr.slower{background:#fbe9e7}img{max-width:100%}"""


# ---- cells ---------------------------------------------------------------------------------------------------------


def headers(rows: Sequence[Row]) -> list[str]:
    graphs = ["graph ms", "graph vs eager"] if any(row.graph_ms for row in rows) else []
    names = [
        "case",
        "shape",
        "dtype",
        "pass",
        "backend",
        "dlops ms",
        "eager ms",
        "compile ms",
        "vs eager",
        "vs compile",
    ]
    return [*names, "peers", *graphs, "rate", "roofline", "peak MB"]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """One row's text under ``columns``, an output of :func:`headers`."""
    others = [name for name in row.speedup if name not in CONTENDERS]
    graph, graph_eager = row.graph_ms.get("dlops"), row.graph_ms.get("eager")
    eager = row.speedup.get("eager")
    text = {
        "case": row.case,
        "shape": row.shape,
        "dtype": SHORT[row.dtype],
        "pass": SHORT[row.direction],
        "backend": row.backend,
        "dlops ms": f"{_ms(row.ms['dlops'])} ±{_ms(row.iqr['dlops'] / 2)}",
        "eager ms": _ms(row.ms.get("eager")),
        "compile ms": _ms(row.ms.get("compile")),
        "vs eager": _ratio(eager) + (f" {SLOWER}" if eager is not None and eager < 1 else ""),
        "vs compile": _ratio(row.speedup.get("compile")),
        "peers": ", ".join(f"{name} {_ratio(row.speedup[name])}" for name in others) or "-",
        "graph ms": _ms(graph),
        "graph vs eager": _ratio(graph_eager / graph if graph and graph_eager else None),
        "rate": row.rate,
        "roofline": f"{row.roofline:.0%}",
        "peak MB": "/".join(f"{row.memory[name] / 1e6:.3g}" for name in CONTENDERS if name in row.memory),
    }
    return [text[column] for column in columns]


SMALL_HEADERS = ["case", "shape", "dtype", "pass", "backend", "dlops us", "eager us", "added us"]


def small_cells(row: Row) -> list[str]:
    ours, eager = row.ms["dlops"] * 1e3, row.ms["eager"] * 1e3
    names = [row.case, row.shape, SHORT[row.dtype], SHORT[row.direction], row.backend]
    return [*names, f"{ours:.1f}", f"{eager:.1f}", f"{row.added_us:+.1f}"]


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """The rows in the order of their cases, and those of small shapes."""
    ordered = sorted(rows, key=lambda row: (row.small, row.family))
    return [row for row in ordered if not row.small], [row for row in ordered if row.small]


def summary(run: Run) -> list[str]:
    """Geometric means, rows below 1.0x, ceilings and what the columns mean."""
    lines = []
    for rival in ("eager", "compile"):
        mean = run.geomean(rival)
        if mean is not None:
            count = sum(rival in row.speedup for row in run.rows if not row.small)
            lines.append(f"geometric mean vs torch {rival}: {mean:.2f}x over {count} rows")
    slower = run.slower()
    lines.append(f"rows below 1.0x of eager: {len(slower)}" + "".join(f"\n  {_name(row)}" for row in slower))
    products = ", ".join(f"{SHORT[name]} {rate(value)}" for name, value in run.ceilings["matmul"].items())
    lines.append(f"ceilings of this run: copy {run.ceilings['copy'] / 1e9:.0f} GB/s; matrix product {products}")
    return lines


LEGEND = (
    "ms: median ± half the interquartile range; speedups: median over rounds of paired ratios, contenders interleaved. "
    "rate and roofline: dlops' fewest bytes or FLOPs, against this run's ceilings (over 100%: it fits in cache). "
    "peak MB: dlops/eager/compile beyond what was held before (CPU: torch.profiler's allocations; "
    "GPU: torch.cuda.max_memory_allocated). Small shapes: the host's time per call."
)


def notes(run: Run) -> list[str]:
    """What cases had to say, contenders that could not run, and jobs that were skipped."""
    lines = [f"{row.case}: {row.note}" for row in run.rows if row.note]
    lines += [f"{_name(row)}: {name} did not run: {why}" for row in run.rows for name, why in row.errors.items()]
    return lines + [f"{job}: skipped: {why}" for job, why in run.skipped.items()]


def _name(row: Row) -> str:
    return f"{row.case} {row.shape} {SHORT[row.dtype]} {SHORT[row.direction]}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


# ---- terminal ------------------------------------------------------------------------------------------------------


def render(run: Run) -> RenderableType:
    """The run as rich tables with its summary below."""
    main, small = split(run.rows)
    parts: list[RenderableType] = []
    if main:
        columns = headers(main)
        parts.append(_table(f"dlops on {run.machine['name']}", columns, [cells(row, columns) for row in main]))
    if small:
        title = "small shapes: host time per call"
        parts.append(_table(title, SMALL_HEADERS, [small_cells(row) for row in small]))
    lines = [*notes(run), LEGEND, *summary(run)]
    return Group(*parts, *(Text(line) for line in lines))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 5 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row, style="red" if any(cell.endswith(SLOWER) for cell in row) else None)
    return table


# ---- plots and HTML ------------------------------------------------------------------------------------------------


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write the plots as PNG and one self-contained ``index.html`` into ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    main, small = split(run.rows)
    plots = (
        {"speedup.png": _speedups(main), "roofline.png": _rooflines(main), "memory.png": _memory(main)} if main else {}
    )
    images, files = "", []
    for name, figure in plots.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        (folder / name).write_bytes(buffer.getvalue())
        files.append(folder / name)
        images += f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">\n'
    columns = headers(main)
    about = "".join(f"<tr><td>{_escape(k)}</td><td>{_escape(v)}</td></tr>" for k, v in run.machine.items())
    body = (
        f"<h1>dlops on {_escape(run.machine['name'])}</h1>"
        + "".join(f"<p>{_escape(line)}</p>" for line in summary(run))
        + images
        + _html_table(columns, [cells(row, columns) for row in main])
        + "<h2>Small shapes: host time per call</h2>"
        + _html_table(SMALL_HEADERS, [small_cells(row) for row in small])
        + f"<p>{_escape(LEGEND)}</p>"
        + "".join(f"<p>{_escape(line)}</p>" for line in notes(run))
        + f"<h2>Machine</h2><table>{about}</table>"
    )
    page = folder / "index.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><title>dlops bench</title><style>{_CSS}</style>{body}\n")
    return [*files, page]


def _escape(value: object) -> str:
    return html.escape(str(value)).replace("\n", "<br>")


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(column)}</th>" for column in columns)
    lines = ""
    for row in rows:
        flag = ' class="slower"' if any(cell.endswith(SLOWER) for cell in row) else ""
        lines += f"<tr{flag}>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><tr>{head}</tr>{lines}</table>"


def _bars(
    rows: Sequence[Row], title: str, bars: dict[str, list[float]], colours: dict[str, str], start: float = 0
) -> "Figure":
    """A group of horizontal bars per row, the first row on top; they begin at ``start``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.2 * len(rows) * (1 + len(bars))))
    axes = figure.subplots()
    height = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        widths = [value - start for value in values]
        places = [place + (i - (len(bars) - 1) / 2) * height for place in range(len(rows))]
        axes.barh(places, widths, height, left=start, label=name, color=colours[name])
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if len(bars) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(bars), frameon=False, fontsize=9)
    return figure


def _speedups(rows: Sequence[Row]) -> "Figure":
    ratios = {f"vs {rival}": [row.speedup.get(rival, math.nan) for row in rows] for rival in ("eager", "compile")}
    colours = {"vs eager": "#3b6ea5", "vs compile": "#e0a030"}
    figure = _bars(rows, "Speedup of dlops (log scale; 1 is equal)", ratios, colours, start=1)
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color="#a02020", linewidth=1)
    return figure


def _rooflines(rows: Sequence[Row]) -> "Figure":
    values = {"dlops": [100 * row.roofline for row in rows]}
    figure = _bars(rows, "Share of the roofline: bytes or FLOPs at this run's ceilings", values, {"dlops": "#3b6ea5"})
    axes = figure.axes[0]
    axes.xaxis.set_major_formatter("{x:g}%")
    axes.axvline(100, color="#a02020", linewidth=1)
    return figure


def _memory(rows: Sequence[Row]) -> "Figure":
    values = {
        name: [row.memory.get(name, math.nan) / max(row.memory["eager"], 1) for row in rows]
        for name in ("dlops", "compile")
    }
    figure = _bars(rows, "Peak memory, as a multiple of eager's", values, {"dlops": "#3b6ea5", "compile": "#e0a030"})
    axes = figure.axes[0]
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color="#a02020", linewidth=1)
    return figure


# ---- docs/performance.md -------------------------------------------------------------------------------------------


def markdown(machines: dict[str, Run], cases: Sequence[Case]) -> str:
    """The page of all stored results: a table per machine, and the cases that have not been measured."""
    parts = ["# Performance", f"Written by `python -m bench --docs` from `bench/results/`.\n\n{LEGEND}"]
    for name, run in machines.items():
        main, small = split(run.rows)
        columns = headers(main)
        about = ", ".join(f"{k} {v}" for k, v in run.machine.items() if v is not None and k not in ("name", "device"))
        parts += [f"## {name}", about, "\n".join(f"- {line}" for line in summary(run))]
        parts.append(_markdown_table(columns, [cells(row, columns) for row in main]))
        if small:
            parts += ["Small shapes:", _markdown_table(SMALL_HEADERS, [small_cells(row) for row in small])]
        parts.append("\n".join(f"- {line}" for line in notes(run)))
    parts += ["## Not measured", "\n".join(f"- {line}" for line in not_measured(machines, cases))]
    return "\n\n".join(part for part in parts if part) + "\n"


def not_measured(machines: dict[str, Run], cases: Sequence[Case]) -> list[str]:
    """A line per case and machine that lacks rows, or device class that no machine stands for: the jobs missing."""
    known: list[tuple[str, Run | None, str]] = [(name, run, run.machine["device"]) for name, run in machines.items()]
    absent = [device for device in ("cpu", "cuda") if device not in {entry[2] for entry in known}]
    known += [(f"{device} (no machine measured)", None, device) for device in absent]
    lines = []
    for name, run, device in known:
        groups: dict[str, dict[str, list[str]]] = {}
        for job in missing(run, device, cases):
            shapes = groups.setdefault(job.case.name, {})
            shapes.setdefault(job.case.describe(job.shape), []).append(SHORT[job.dtype])
        for case, shapes in groups.items():
            absences = [f"{shape} ({', '.join(dtypes)})" for shape, dtypes in shapes.items()]
            lines.append(f"{name}: {case}: {'; '.join(absences)}")
    return lines


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * 5 + ["---:"] * (len(columns) - 5), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
