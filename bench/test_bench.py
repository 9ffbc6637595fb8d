"""The benchmark itself: discovery, the runner's bookkeeping, results, reports."""

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import case as registry
from bench import lengths, measure, rows, train
from bench.case import Job, Problem, discover, importable, jobs, select
from bench.report import markdown, not_measured, render, write_report
from bench.rows import Run, missing
from bench.runner import Settings, _warm_up, run

CEILINGS = {"copy": 1e10, "matmul": {"float32": 1e11, "bfloat16": 1e11}}
MACHINE = {"name": "Test CPU, 2 cores", "device": "cpu", "date": "2026-01-01 00:00 UTC"}


def double(device: torch.device, dtype: torch.dtype, rows: int, wrong: int) -> Problem:
    x = torch.randn(rows, 16, device=device, dtype=dtype)
    return Problem(
        dlops=lambda x: x * 3 if wrong else x + x, eager=lambda x: x + x, args=(x,), bytes=(128, 320), flops=(0, 0)
    )


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(registry, "_cases", dict(discover()))
    registry.case(cpu=[(64, 0)], small=(2, 0), name="double")(double)
    return registry._cases["double"]


@pytest.fixture
def results(case) -> Run:
    done = Run(dict(MACHINE), CEILINGS)
    list(run(jobs([case], "cpu", ["float32"], False), done, Settings(0.02, rivals=False), lambda text: None))
    return done


def test_every_case_is_found_and_selected_by_name_family_and_pattern():
    names = set(discover())
    assert {"linear_gelu", "rms_norm", "layer_norm", "gated_linear_silu", "maxout_linear", "minilm_encode"} <= names
    assert [c.name for c in select(["add_*"])] == ["add_layer_norm", "add_rms_norm"]
    assert {c.family for c in select(["norm"])} == {"norm"}
    with pytest.raises(ValueError, match="no case 'nonsense'"):
        select(["nonsense"])


def test_a_row_per_direction_and_its_numbers(results):
    assert [(row.small, row.direction) for row in results.rows] == [
        (small, direction) for small in (False, True) for direction in registry.DIRECTIONS
    ]
    row = results.rows[0]
    assert (row.backend, row.difference, row.bound) == ("torch", 0, "bytes")
    assert row.roofline == pytest.approx(128 / 1e10 / (row.ms["dlops"] / 1e3))
    assert row.memory["dlops"] == 64 * 16 * 4
    assert results.geomean("eager") == pytest.approx(
        (results.rows[0].speedup["eager"] * results.rows[1].speedup["eager"]) ** 0.5
    )


def test_a_wrong_result_fails_and_the_others_still_run(case):
    done = Run(dict(MACHINE), CEILINGS)
    todo = [Job(case, (8, 1), "float32", "cpu"), Job(case, (8, 0), "float32", "cpu")]
    list(run(todo, done, Settings(0.02, rivals=False), lambda text: None))
    assert list(done.failures) == ["double 8x1 float32"]
    assert "differ by 0.5" in done.failures["double 8x1 float32"]
    assert len(done.rows) == 2


def test_exit_status_says_whether_a_case_failed(case, monkeypatch, capsys):
    monkeypatch.setattr(measure, "ceilings", lambda *args: CEILINGS)
    assert command.main(["double", "--device", "cpu", "--only-eager", "--seconds", "0.02"]) == 0
    registry.case(cpu=[(4, 1)], name="broken")(double)
    assert command.main(["broken", "--device", "cpu", "--only-eager", "--seconds", "0.02"]) == 1
    assert "broken 4x1 float32" in capsys.readouterr().out


def test_measuring_some_rows_again_keeps_the_others(case, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(measure, "ceilings", lambda *args: CEILINGS)
    kept = tmp_path / "kept.json"
    quick = ["double", "--device", "cpu", "--only-eager", "--seconds", "0.02", "--json", str(kept)]
    assert command.main([*quick, "--dtype", "bfloat16"]) == 0
    assert command.main(quick) == 0
    assert sorted(row.dtype for row in Run.load(kept).rows) == 4 * ["bfloat16"] + 4 * ["float32"]
    before = kept.read_text()
    assert command.main([*quick, "--resume"]) == 0
    assert json.loads(kept.read_text())["rows"] == json.loads(before)["rows"]
    other = Run.load(kept)
    other.machine["name"] = "another"
    other.save(kept)
    with pytest.raises(SystemExit):
        command.main(quick)
    assert "holds results of another" in capsys.readouterr().err


@pytest.mark.parametrize("static", [[], ["--static"]])
def test_results_that_could_not_be_kept_are_not_measured(static, capsys, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    json = (["--json", tmp_path / "file" / "x.json"], ["--json", tmp_path / "folder.json"])
    for option, path in (*json, ["--report", tmp_path / "file"]):
        with pytest.raises(SystemExit):
            command.main([*static, option, str(path)])
        assert "cannot be written to" in capsys.readouterr().err


def test_a_rival_that_cannot_run_is_named(case):
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    problem = double(torch.device("cpu"), torch.float32, 4, 0)
    calls, errors = {"dlops": lambda: problem.args[0], "peer": lambda: broken(problem.args[0])}, {}
    _warm_up(calls, errors)
    assert list(calls) == ["dlops"]
    assert errors == {"peer": "RuntimeError: no such kernel"}


def test_results_round_trip_and_newer_rows_win(results, tmp_path: Path):
    results.save(tmp_path / "old.json")
    data = json.loads((tmp_path / "old.json").read_text())
    data["machine"]["date"], data["rows"] = "2026-02-01 00:00 UTC", data["rows"][:1]
    data["rows"][0]["backend"] = "cpu"
    (tmp_path / "new.json").write_text(json.dumps(data))
    merged = rows.stored(tmp_path)[MACHINE["name"]]
    assert len(merged.rows) == len(results.rows)
    assert {row.key: row.backend for row in merged.rows}[results.rows[0].key] == "cpu"


def test_missing_lists_what_has_no_row(results, case):
    assert missing(results, "cpu", [case], ["float32"]) == []
    assert {job.dtype for job in missing(results, "cpu", [case])} == {"bfloat16", "float16"}
    assert len(missing(None, "cpu", [case], ["float32"])) == 2
    assert any(line.startswith("cuda (no machine measured): linear_gelu") for line in not_measured({}, select([])))


def test_reports(results, case, tmp_path: Path):
    files = write_report(results, tmp_path)
    assert {file.name for file in files} == {"speedup.png", "roofline.png", "memory.png", "index.html"}
    assert files[-1].read_text().count("data:image/png;base64,") == 3
    page = markdown({MACHINE["name"]: results}, [case])
    assert "## Test CPU, 2 cores" in page
    assert "| double | 64x0 | fp32 | fwd |" in page
    assert "Test CPU, 2 cores: double: 64x0 (bf16, fp16)" in page
    assert render(results)


def test_importable_is_none_for_what_is_not_installed():
    assert importable("no_such_package:thing") is None
    assert importable("math:pi") == pytest.approx(3.14159, abs=1e-4)


def test_the_text_is_learnt_as_by_the_plain_model(tmp_path):
    curves = train.both(steps=4)
    ours, theirs = (torch.tensor(curves[name].losses) for name in ("dlops", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert theirs[-1] < theirs[0]
    train.plot(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_lengths_are_measured_in_both_directions(monkeypatch, tmp_path):
    monkeypatch.setattr(lengths, "LENGTHS", [8, 16])
    found = lengths.times("cpu", dim=4, dstate=2)
    assert {direction: len(ms) for direction, ms in found.items()} == dict.fromkeys(registry.DIRECTIONS, 2)
    lengths.plot(found, "a title", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000
