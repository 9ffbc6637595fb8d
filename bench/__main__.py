"""``python -m bench``: measure dlops beside torch eager, torch.compile and installed peers.

With ``--static`` nothing is measured: every kernel is compiled for every chip and its code checked, with no GPU.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: the profiler, used for peak memory, prints otherwise

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import measure, report, rows, runner
from bench.case import DEVICE_DTYPES, DTYPES, jobs, select
from bench.static import report as static
from bench.static.check import check
from bench.static.chip import CHIPS

DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
ALL = "all known machines"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, accepted are positive numbers")
    return value


def _json_path(text: str) -> Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, accepted is a file name ending in .json; names of cases come first"
        )
    path = Path(text)
    _writable(path, not path.is_dir() and (path.exists() or _existing(path).is_dir()))
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    _writable(path, _existing(path).is_dir())
    return path


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _writable(path: Path, fits: bool) -> None:
    if not fits or not os.access(_existing(path), os.W_OK):
        raise argparse.ArgumentTypeError(f"{_existing(path)} cannot be written to")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench", description=__doc__)
    p.add_argument(
        "names", nargs="*", metavar="name", help="cases, families or patterns such as 'linear_*'; default all"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    p.add_argument(
        "--dtype", choices=tuple(DTYPES), action="append", help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    p.add_argument("--all", action="store_true", help="every shape and dtype instead of the representative ones")
    p.add_argument("--seconds", type=_positive, default=runner.Settings.seconds, help="of timing per row (%(default)s)")
    p.add_argument("--only-eager", action="store_true", help="leave torch.compile and peers out")
    p.add_argument(
        "--json",
        nargs="?",
        type=_json_path,
        const=Path(),
        metavar="F",
        help="keep the results in F, with its rows that were not measured again; default F: bench/results/",
    )
    p.add_argument("--resume", action="store_true", help="with --json: measure only what its file has no row for")
    p.add_argument("--report", type=_folder, metavar="DIR", help="write plots and an HTML page")
    p.add_argument(
        "--docs", nargs="?", type=Path, const=DOCS, metavar="F", help="write docs/performance.md from bench/results/"
    )
    p.add_argument("--missing", nargs="?", const=ALL, metavar="MACHINE", help="list what bench/results/ has no row for")
    p.add_argument("--static", action="store_true", help="compile the kernels for every chip and gate them")
    p.add_argument(
        "--chip", choices=[str(chip) for chip in CHIPS.values()], action="append", help="with --static; default: every"
    )
    p.add_argument("--list", action="store_true", help="list the cases")
    return p


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def gate_kernels(args: argparse.Namespace, console: Console) -> int:
    """--static: prints and keeps the rows; 1 if a gate failed."""
    if args.json == Path():
        raise ValueError("--static --json needs a file")
    if args.json and args.json.exists() and not static.saved(args.json):
        raise ValueError(f"{args.json} holds something else, which --static would replace")
    with progress_bar(console) as progress:
        task = progress.add_task("finding the kernels", total=None)
        found = check(
            args.names,
            args.all,
            lambda name, n, of: progress.update(task, description=f"compiling {name}", completed=n, total=of),
            [chip.arch for chip in CHIPS.values() if not args.chip or str(chip) in args.chip],
        )
    static.show(found, console)
    if args.json:
        static.save(found, args.json)
    return 1 if found.failures() else 0


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if args.static:
        try:
            return gate_kernels(args, console)
        except ValueError as error:
            p.error(str(error))
        except KeyboardInterrupt:
            console.print("interrupted; what was compiled is kept")
            return 130
    if args.chip:
        p.error("--chip is for --static")
    try:
        cases = select(args.names)
    except ValueError as error:
        p.error(str(error))
    if args.list:
        for case in cases:
            shapes = {device: [case.describe(s) for s in found] for device, found in case.shapes.items() if found}
            console.print(f"{case.family}: {case.name}: {shapes or 'only with --all'}", soft_wrap=True, highlight=False)
        return 0
    if args.missing or args.docs:
        machines = rows.stored()
        if args.docs:
            args.docs.write_text(report.markdown(machines, cases))
            console.print(f"wrote {args.docs}")
        if args.missing:
            if args.missing != ALL and args.missing not in machines:
                p.error(f"no results of {args.missing!r}; there are: {', '.join(machines) or 'none'}")
            lines = report.not_measured(machines, cases)
            for line in lines:
                if args.missing in (ALL, line.partition(": ")[0]):
                    print(line)
        return 0

    if args.resume and args.json is None:
        p.error("--resume: it needs the file that --json names")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA GPU")
    dtypes = args.dtype or (DEVICE_DTYPES[device] if args.all else DEVICE_DTYPES[device][:1])
    todo = []
    for case in cases:  # a case that was named is measured, even if only --all would
        todo += jobs([case], device, dtypes, args.all or bool(args.names and not case.shapes[device]))
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")

    with progress_bar(console) as progress:
        task = progress.add_task("measuring this machine's ceilings", total=len(todo))
        run = rows.Run(measure.machine(device), measure.ceilings(device, dtypes))
        path = None
        if args.json is not None:
            path = rows.default_path(run.machine) if args.json == Path() else args.json
        older = rows.Run.load(path) if path and path.exists() else None
        if older and older.machine["name"] != run.machine["name"]:
            p.error(f"--json {path}: it holds results of {older.machine['name']}; choose another file")
        if args.resume:
            todo = rows.unmeasured(older, todo)
            progress.update(task, total=len(todo))
        settings = runner.Settings(args.seconds, rivals=not args.only_eager)
        for _ in runner.run(todo, run, settings, lambda text: progress.update(task, description=text)):
            progress.advance(task)
            progress.update(task, description="measured")
            if path:
                run.after(older).save(path)  # after every case: a run that is cut short keeps what it measured
    if args.resume:
        run = run.after(older)
    console.print(report.render(run))
    for job, trace in run.failures.items():
        console.print(f"FAILED {job}\n{trace}", style="red", markup=False, highlight=False)
    if args.report:
        for file in report.write_report(run, args.report):
            console.print(f"wrote {file}")
    if run.failures:
        console.print(f"{len(run.failures)} of {len(todo)} failed: {'; '.join(run.failures)}", style="bold red")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
