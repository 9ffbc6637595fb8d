"""What an install gives: the command, a quick and silent import, and what setup.py does where something is missing."""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

import dlops
from dlops import backend

ROOT = Path(__file__).parents[1]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.1" ;;
--list-gpu-code) echo sm_80; echo sm_90 ;;
*) echo '#$ TOP={top}/bin/..' >&2; echo '#$ INCLUDES="-I{top}/include"  ' >&2 ;;
esac
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    drop = {"CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_CCBIN"}
    kept = {key: value for key, value in os.environ.items() if key not in drop and not key.startswith("DLOPS_")}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    done = run(sys.executable, "-W", "error::UserWarning", "-c", code, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# ---- import and python -m dlops ------------------------------------------------------------------------------------

IMPORT = """
import sys, time, warnings, torch
{before}
warnings.simplefilter("error")
known, start = set(sys.modules), time.process_time()
import dlops
print(time.process_time() - start, *sorted(set(sys.modules) - known))
"""


def test_import_is_quick_silent_and_lazy() -> None:
    seconds = []
    for _ in range(3):
        first, *modules = python(IMPORT.format(before="")).split()
        seconds.append(float(first))
        assert all(name.partition(".")[0] == "dlops" for name in modules), "only dlops itself is imported"
        assert not {"dlops._cuda", "dlops.kernels", "dlops.models"} & set(modules)
    assert min(seconds) < 0.3, "CPU seconds beyond import torch"


@pytest.mark.parametrize("absent", ["triton", "dlops._C", "dlops._cuda", "numpy"])
def test_works_without(absent: str) -> None:
    also = "sys.modules['dlops._simt'] = " if absent == "dlops._cuda" else ""  # else the kernels are emulated
    code = IMPORT.format(before=f"{also}sys.modules[{absent!r}] = None") + (
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "dlops.functional.add_rms_norm(x, x, [8])[0].sum().backward()\n"
        "print(dlops.backends())"
    )
    reasons = python(code).splitlines()[-1]
    name = {"triton": "triton", "dlops._C": "cpu", "dlops._cuda": "cuda"}.get(absent)
    assert name is None or re.search(rf"'{name}': ['\"].*install", reasons), "the reason says how to get it"


class FakeCuda(ModuleType):
    """dlops._cuda, as far as it tells what it needs."""

    def build_info(self) -> dict[str, object]:
        return {"cuda": 13000, "architectures": "8.0;9.0a;10.0f;12.0+PTX"}

    def driver_version(self) -> int:
        return 13010


def missing_cuda(monkeypatch: pytest.MonkeyPatch, gpu: bool = True, capability: tuple[int, int] = (8, 0)) -> str | None:
    monkeypatch.setattr(backend, "cuda_emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    return backend._missing_cuda()


def test_why_cuda_is_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlops._cuda", None)  # pyright: ignore[reportArgumentType]
    assert "is not built; install dlops with nvcc" in str(missing_cuda(monkeypatch))
    monkeypatch.setitem(sys.modules, "dlops._cuda", FakeCuda("dlops._cuda"))
    assert missing_cuda(monkeypatch) is None

    def no_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert str(missing_cuda(monkeypatch, gpu=False)).endswith("driver on your system is too old (found version 11040)")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "CUDA_VISIBLE_DEVICES" in str(missing_cuda(monkeypatch, gpu=False))
    monkeypatch.setattr(FakeCuda, "driver_version", lambda self: 12080)
    assert "with CUDA 13.0 and the driver knows CUDA 12.8; update the driver" in str(missing_cuda(monkeypatch))

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    assert "is built but cannot be loaded (undefined symbol: x)" in str(missing_cuda(monkeypatch))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *[((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((12, 1), True), ((13, 0), True)],
        *[((7, 5), False), ((9, 1), False), ((11, 0), False)],
    ],
)
def test_architectures_that_are_compiled_for(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dlops._cuda", FakeCuda("dlops._cuda"))
    reason = missing_cuda(monkeypatch, capability=capability)
    wanted = (
        f"compute capability {capability[0]}.{capability[1]} and dlops._cuda is built for 8.0, 9.0a, 10.0f, 12.0+PTX"
    )
    assert reason is None if runs else wanted in str(reason)


def test_command_lists_everything(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "dlops", cwd=tmp_path)
    for word in (dlops.__version__, torch.__version__, "triton", "numpy", "dlops._C", "dlops._cuda", *backend.BACKENDS):
        assert word in done.stdout
    if backend.missing("cpu") is None:
        assert "generic" in done.stdout
    assert done.returncode == int("the compiler is" in done.stdout), done.stdout + done.stderr


# As python -m dlops, without the finder of an editable install, which would find the modules of this clone.
COMMAND = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", ""))]
runpy.run_module("dlops", run_name="__main__", alter_sys=True)
"""


def test_command_says_that_the_clone_hides_the_install(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("clone", "site"):
        shutil.copytree(ROOT / "dlops", tmp_path / folder / "dlops", ignore=ignore)
    compiler = program(tmp_path / "bin" / "c++", "#!/bin/sh\n").parent
    search = {"PYTHONPATH": str(tmp_path / "site"), "PATH": str(compiler)}
    done = run(sys.executable, "-c", COMMAND, cwd=tmp_path / "clone", **search)
    assert f"hides the dlops installed in {tmp_path / 'site' / 'dlops'}" in done.stdout
    assert done.returncode == 1
    done = run(sys.executable, "-c", COMMAND, cwd=tmp_path, **search)
    assert "dlops._C: not here, but the compiler is" in done.stdout
    assert done.returncode == 1
    done = run(sys.executable, "-c", COMMAND, cwd=tmp_path, **{**search, "PATH": str(tmp_path)})
    assert done.returncode == 0, "nothing is wrong where there is no compiler"


def test_version_has_one_source() -> None:
    assert importlib.metadata.version("dlops") == dlops.__version__


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
def test_build_info() -> None:
    module = importlib.import_module("dlops._C")
    info, features = module.build_info(), module.cpu_features()
    assert {"compiler", "flags", "torch", "isas"} == set(info)
    assert "-O3" in info["flags"] and features["isa"] in info["isas"]
    if features["isa"] != "generic":
        assert features[features["isa"]] and features["fma"] and features["f16c"]
    binary = Path(module.__file__).read_bytes()
    assert str(ROOT).encode() not in binary and str(Path(torch.__file__).parent).encode() not in binary


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_function_of_one_instruction_set_can_replace_anothers() -> None:
    for built in ROOT.glob("build/*/host_avx*/*.o"):
        isa = built.parent.name.removeprefix("host_")
        for symbol in run("nm", "-C", "--defined-only", built, cwd=ROOT).stdout.splitlines():
            assert not re.match(r"\S+ [WVu] ", symbol) or f"dlops::{isa}::" in symbol, f"{built}: {symbol}"


# ---- setup.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that an install needs, and nothing built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("dlops", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / "clone" / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, tmp_path / "clone")
    return tmp_path / "clone"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("dlops_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder: Path) -> Path:
    """A toolkit whose nvcc answers as CUDA 12.4's and compiles nothing."""
    program(folder / "bin" / "nvcc", NVCC.format(top=folder))
    program(folder / "include" / "cuda_runtime.h", "")
    return folder


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("DLOPS_BACKEND", "'torch', 'vendor', 'cpu', 'triton', 'cuda', or None"), ("DLOPS_SIMT", "0 and 1")],
)
def test_a_wrong_switch_is_an_error(name: str, accepted: str) -> None:
    done = run(sys.executable, "-c", "import dlops", cwd=ROOT, **{name: "on"})
    assert done.returncode and f"{name}: got 'on', accepted are {accepted}" in done.stderr, done.stderr


def build(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=clone, **environment)


def test_without_a_compiler_it_installs_and_says_so(clone: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    stale = clone / "dlops" / f"_C{SUFFIX}"
    stale.write_text("of an older build")
    done = build(clone, PATH=str(empty))
    assert done.returncode == 0, done.stderr
    assert "NOT building dlops._C: it needs a C++ compiler" in done.stderr
    assert "not building dlops._cuda: it needs a C++ compiler" in done.stderr
    assert "not building dlops._simt: it needs a C++ compiler" in done.stderr
    assert not stale.exists(), "what is there is what was built"
    done = run(sys.executable, "setup.py", "-q", "bdist_wheel", cwd=clone, PATH=str(empty))
    assert done.returncode == 0, done.stderr
    (wheel,) = clone.glob("dist/*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dlops").rglob("*.py")}
    modules |= {f"dlops/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert modules | {"dlops/py.typed"} <= files
    assert {name.partition("/")[0] for name in files} == {"dlops", f"dlops-{dlops.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in files)
    code = "import torch, dlops; print(dlops.__file__, dlops.functional.rms_norm(torch.ones(2, 4), [4]).sum().item())"
    assert python(code, cwd=site).split() == [str(site / "dlops" / "__init__.py"), "8.0"]


def test_a_compiler_that_fails_is_an_error(clone: Path, tmp_path: Path) -> None:
    broken = program(tmp_path / "bin" / "c++", "#!/bin/sh\necho out of cheese >&2; exit 1\n")
    done = build(clone, CXX=str(broken), DLOPS_BUILD_CUDA="0")
    assert done.returncode != 0 and "the build failed" in done.stderr
    assert "out of cheese" in done.stdout + done.stderr
    done = build(clone, CXX="nonesuch-c++")
    assert done.returncode != 0 and "CXX names a compiler that is not there: nonesuch-c++" in done.stderr


def fake_torch(folder: Path, version: str) -> str:
    program(folder / "torch" / "__init__.py", f"class version:\n    cuda = None\n__version__ = {version!r}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DLOPS_BUILD_CUDA": "2"}, "DLOPS_BUILD_CUDA: got '2', accepted are 0, 1"),
        ({"DLOPS_BUILD_CUDA": "0", "DLOPS_BUILD_SIMT": "2"}, "got '2', accepted are 0, 1, address, debug"),
        (
            {"CUDA_HOME": "/nonesuch"},
            "=1, but building dlops._cuda needs a CUDA toolkit (nvcc in CUDA_HOME (/nonesuch/bin))",
        ),
        ({"PATH": ""}, "=1, but building dlops._cuda needs a C++ compiler"),
        ({"torch": "2.11.0+cpu"}, "needs a CUDA build of torch (torch 2.11.0+cpu is not one)"),
        ({"torch": "2.10.1"}, "torch 2.10.1 is here, dlops needs torch >= 2.11"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_forcing_what_cannot_be_built_names_what_is_missing(
    clone: Path, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    compiler = program(tmp_path / "bin" / "c++", "#!/bin/sh\n").parent
    home = toolkit(tmp_path / "cuda")
    given = {"DLOPS_BUILD_CUDA": "1", "PATH": str(compiler), "CUDA_HOME": str(home), **environment}
    if version := given.pop("torch", None):
        given["PYTHONPATH"] = fake_torch(tmp_path / "fake", version)
    done = build(clone, **given)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_toolkit_behind_a_wrapper_is_found(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "far" / "cuda")
    wrapper = program(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    found = setup.Toolkit()
    assert found.root == home and found.nvcc == home / "bin" / "nvcc" and found.version == "12.4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found.archs(torch) == ["8.0", "9.0a"], "the defaults that this nvcc knows"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0))[i])
    assert found.archs(torch) == ["8.0", "9.0a"], "the GPUs present"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (12, 0))
    with pytest.raises(setup.Missing, match=r"newer than 12\.4, which cannot build for 12\.0"):
        found.archs(torch)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    assert found.archs(torch) == ["8.6", "9.0a", "12.0+PTX"], "the list, as it is"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="got 'Hopper', accepted are entries like"):
        found.archs(torch)


def test_the_emulation_is_built_in_place_only(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLOPS_BUILD_SIMT", raising=False)
    command = setup.BuildExt(setuptools.Distribution({"name": "dlops", "ext_modules": []}))
    command.inplace = False
    assert "not asked for" in command.plan_simt(setup.Ninja(ROOT))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setenv("DLOPS_BUILD_SIMT", "1")
    with pytest.raises(SystemExit, match="DLOPS_BUILD_SIMT=1, but building dlops._simt needs an x86-64 or ARM64 CPU"):
        command.plan_simt(setup.Ninja(ROOT))


def test_gencode(setup: ModuleType) -> None:
    assert setup.gencode(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_changed_header_rebuilds_what_includes_it(setup: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    header = program(folder / "a.h", "int a();\n")
    sources = [
        program(folder / "a.cpp", '#include "a.h"\nint a() { return 1; }\n'),
        program(folder / "b.cpp", "int b() { return 2; }\n"),
    ]

    def times() -> list[int]:
        ninja = setup.Ninja(folder / "build")
        objects = ninja.compile("host", ["c++", "-fPIC", f"-I{folder}", '-DTEXT="a b"'], sources)
        ninja.link("link", ["c++", "-shared"], objects, [], folder / "both.so")
        ninja.run()
        return [path.stat().st_mtime_ns for path in (*objects, folder / "both.so")]

    first = times()
    assert times() == first, "nothing to do"
    later = header.stat().st_mtime_ns + 5_000_000_000
    os.utime(header, ns=(later, later))
    second = times()
    assert second[0] > first[0] and second[1] == first[1] and second[2] > first[2]
