"""Results: a row per measured direction of a case, a run of rows with its machine, and the files that keep runs."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.case import DEVICE_DTYPES, Case, Job, jobs

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One direction of one case.

    Args:
        backend: the backends that dlops ran on, joined by ``+``.
        ms, iqr, graph_ms: by contender: median, interquartile range, median of its CUDA graph.
        speedup: by rival: the median over rounds of its time over dlops'.
        roofline: the time that the bytes or FLOPs take at this run's ceilings, over dlops' time.
        bound: which of the two takes longer, ``"bytes"`` or ``"flops"``.
        memory: bytes, by contender: the peak beyond what was held before.
        added_us: the median over rounds of dlops' time less eager's, in microseconds.
        difference: the largest over outputs (gradients) of max|dlops - eager| / max|eager|.
        errors: contenders that could not run, and why.
    """

    case: str
    family: str
    shape: str
    dtype: str
    device: str
    direction: str
    small: bool
    backend: str
    ms: dict[str, float]
    iqr: dict[str, float]
    speedup: dict[str, float]
    bytes: float
    flops: float
    roofline: float
    bound: str
    memory: dict[str, int]
    difference: float
    added_us: float
    graph_ms: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.case, self.shape, self.dtype, self.device, self.direction

    @property
    def rate(self) -> str:
        """What dlops reached: GB/s where bytes bound the case, else TFLOP/s (GFLOP/s on a CPU)."""
        per_second = 1e3 / self.ms["dlops"]
        if self.bound == "bytes":
            return f"{self.bytes * per_second / 1e9:.0f} GB/s"
        return rate(self.flops * per_second)


@dataclass
class Run:
    """The rows of one run, or of several on one machine."""

    machine: dict[str, Any]
    ceilings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def geomean(self, rival: str) -> float | None:
        """The geometric mean of the speedup over ``rival``, small shapes aside."""
        ratios = [row.speedup[rival] for row in self.rows if not row.small and rival in row.speedup]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    def slower(self, rival: str = "eager") -> list[Row]:
        """The rows in which dlops is slower than ``rival``, small shapes aside."""
        return [row for row in self.rows if not row.small and row.speedup.get(rival, 1.0) < 1.0]

    def after(self, older: "Run | None") -> "Run":
        """This run, with the rows that only an older one of the same machine has."""
        if older is None or older.machine["name"] != self.machine["name"]:
            return self
        fresh = {row.key for row in self.rows}
        return replace(self, rows=[row for row in older.rows if row.key not in fresh] + self.rows)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Run":
        data = json.loads(path.read_text())
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def rate(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"


def default_path(machine: dict[str, Any]) -> Path:
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-") + ".json")


def stored(folder: Path = RESULTS) -> dict[str, Run]:
    """Every run kept in ``folder``, by machine; where several have the same row, the newest run's."""
    runs = sorted((Run.load(path) for path in folder.glob("*.json")), key=lambda run: run.machine["date"])
    machines: dict[str, Run] = {}
    for run in runs:
        machines[run.machine["name"]] = run.after(machines.get(run.machine["name"]))
    return machines


def missing(run: Run | None, device: str, cases: Iterable[Case], dtypes: Sequence[str] = ()) -> list[Job]:
    """The jobs of ``cases`` on a device class for which ``run`` lacks a row of a direction."""
    return unmeasured(run, jobs(list(cases), device, dtypes or DEVICE_DTYPES[device], everything=True))


def unmeasured(run: Run | None, wanted: Iterable[Job]) -> list[Job]:
    """Those of the wanted jobs for which ``run`` lacks a row of a direction."""
    have = {row.key for row in run.rows} if run else set()
    return [job for job in wanted if any(job.key(direction) not in have for direction in job.case.directions)]
