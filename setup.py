"""Builds dlops._C (CPU kernels, always) and dlops._cuda (CUDA kernels, where they can be built) with ninja.

DLOPS_BUILD_CUDA=0 or 1 skips or forces dlops._cuda; TORCH_CUDA_ARCH_LIST chooses its architectures.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "8.0;9.0a;10.0a;12.0+PTX"
BASE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    f"-I{CSRC}",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
HOST_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


class Missing(Exception):
    """Something that a build needs is not there; the message names it."""


def cxx() -> str:
    name = os.environ.get("CXX", "c++").split()[0]
    found = shutil.which(name) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise Missing("a C++ compiler (c++, g++ or clang++ on PATH, or CXX)")
    return found


def cuda_home() -> Path:
    """The toolkit's root. The nvcc on PATH may be a wrapper outside of it, so nvcc itself is asked."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc is not None:
        dryrun = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        candidates += re.findall(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    for candidate in [*candidates, "/usr/local/cuda"]:
        if (
            candidate
            and (Path(candidate) / "include/cuda_runtime.h").exists()
            and (Path(candidate) / "bin/nvcc").exists()
        ):
            return Path(candidate).resolve()
    raise Missing("a CUDA toolkit (nvcc on PATH, or CUDA_HOME, with include/cuda_runtime.h)")


def cuda_archs(torch) -> list[str]:
    """Compute capabilities to build for, like "9.0a" or "12.0+PTX"."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if not chosen and torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        chosen = ";".join(f"{major}.{minor}{'a' if major in (9, 10) else ''}" for major, minor in sorted(capabilities))
    archs = [arch for arch in (chosen or DEFAULT_ARCHS).split(";") if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", arch):
            raise Missing(f"TORCH_CUDA_ARCH_LIST entries like 8.0, 9.0a or 12.0+PTX (got {arch!r})")
    return archs


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Ninja:
    """One build.ninja: compile edges with header dependencies, one link edge."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target
        self.rules: dict[str, str] = {}
        self.edges: list[str] = []
        self.objects: list[str] = []

    def compile(self, rule: str, command: list[str], sources: list[Path]) -> None:
        self.rules[rule] = (
            f"rule {rule}\n  command = {' '.join(command)} -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n"
        )
        for source in sources:
            built = self.folder / f"{rule}_{source.parent.name}_{source.stem}.o"
            self.edges.append(f"build {_escape(built)}: {rule} {_escape(source)}\n")
            self.objects.append(_escape(built))

    def run(self, link: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.rules["link"] = f"rule link\n  command = {' '.join(link)} -o $out\n".replace("$objects", "$in")
        edge = f"build {_escape(self.target)}: link {' '.join(self.objects)}\n"
        (self.folder / "build.ninja").write_text("".join([*self.rules.values(), *self.edges, edge]))
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.run([*command, "-C", str(self.folder)], check=True)


def _escape(path: Path) -> str:
    return str(path).replace(" ", "$ ").replace(":", "$:")


class BuildExt(build_ext):
    """Writes and runs one build.ninja per extension."""

    def run(self) -> None:
        built = [self.build_host()]
        built += [self.build_cuda()]
        self.extensions = [e for e, ok in zip(self.extensions, built, strict=True) if ok]
        if self.inplace:
            self.copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        raise NotImplementedError("run() builds every extension")

    def ninja(self, name: str) -> Ninja:
        target = Path(self.build_lib).resolve() / self.get_ext_filename(self.get_ext_fullname(name))
        return Ninja(Path(self.build_temp).resolve() / name.rpartition(".")[2], target)

    def build_host(self) -> bool:
        try:
            compiler = cxx()
        except Missing as missing:
            print(
                f"dlops: NOT building dlops._C: it needs {missing}. dlops works without its CPU kernels.",
                file=sys.stderr,
            )
            return False
        torch, includes, libraries = torch_paths()
        base = [compiler, *BASE_FLAGS, *HOST_FLAGS]
        build = self.ninja("dlops._C")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for isa in ISA_FLAGS if x86 else ("generic",):
            build.compile(isa, [*base, *ISA_FLAGS[isa], f"-DDLOPS_ISA={isa}"], sorted(CSRC.glob("cpu/*.cpp")))
        defines = [version_define(torch)]
        sources = [s for s in sorted(CSRC.glob("bind/*.cpp")) if not s.name.startswith("cuda_")]
        build.compile("bind", [*base, *includes, *defines], sources)
        build.run([compiler, "-shared", "$objects", *libraries, "-ltorch_cpu", "-ltorch", "-lc10"])
        return True

    def build_cuda(self) -> bool:
        forced = os.environ.get("DLOPS_BUILD_CUDA", "")
        if forced not in ("", "0", "1"):
            raise SystemExit(f"dlops: DLOPS_BUILD_CUDA is {forced!r}, accepted are 0 and 1")
        if forced == "0":
            return False
        try:
            compiler, home = cxx(), cuda_home()
            torch, includes, libraries = torch_paths()
            if torch.version.cuda is None:
                raise Missing(f"a CUDA build of torch (torch {torch.__version__} is a CPU build)")
            archs = cuda_archs(torch)
        except Missing as missing:
            if forced == "1":
                raise SystemExit(f"dlops: DLOPS_BUILD_CUDA=1, but building dlops._cuda needs {missing}") from None
            print(f"dlops: not building dlops._cuda: it needs {missing}", file=sys.stderr)
            return False
        build = self.ninja("dlops._cuda")
        nvcc = [str(home / "bin/nvcc"), "-O3", "-std=c++20", f"-I{CSRC}", f"-ccbin={compiler}", "--threads=0"]
        nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(archs)]
        build.compile("nvcc", nvcc, sorted(CSRC.glob("cuda/*.cu")))
        defines = [
            "-DUSE_CUDA",
            version_define(torch),
            f"'-DDLOPS_CUDA_ARCHS=\"{';'.join(archs)}\"'",
            f"-I{home}/include",
        ]
        shared = [s for s in sorted(CSRC.glob("bind/*.cpp")) if s.name.startswith("cuda_") or s.name == "check.cpp"]
        build.compile("bind", [compiler, *BASE_FLAGS, *HOST_FLAGS, *includes, *defines], shared)
        cuda = [f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        build.run(
            [compiler, "-shared", "$objects", *libraries, "-ltorch_cpu", "-ltorch_cuda", "-ltorch", "-lc10", *cuda]
        )
        return True

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / self.get_ext_filename(e.name)) for e in self.extensions]


def torch_paths():
    """torch itself, the include flags of extensions, and where its libraries are."""
    import pybind11
    import torch

    root = Path(torch.__file__).parent
    includes = [root / "include", sysconfig.get_paths()["include"], pybind11.get_include()]
    return torch, [f"-isystem {path}" for path in includes], [f"-L{root / 'lib'}"]


def version_define(torch) -> str:
    return f"'-DDLOPS_TORCH_VERSION=\"{torch.__version__}\"'"


setup(
    ext_modules=[Extension("dlops._C", []), Extension("dlops._cuda", [])],
    cmdclass={"build_ext": BuildExt},
    packages=["dlops", "dlops.kernels", "dlops.models", "dlops.models.plain", "dlops.nn", "dlops.ops"],
    package_dir={"dlops": "dlops", "dlops.kernels": "kernels"},
)
