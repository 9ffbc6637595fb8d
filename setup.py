"""Builds dlops._C (CPU kernels, always), dlops._cuda (CUDA kernels, where they can be built) and, in place or in an
editable install, dlops._simt (CUDA kernels on the host, for tests) with ninja.

Environment: CXX chooses the C++ compiler, MAX_JOBS the number of parallel jobs (default: one per CPU).
DLOPS_BUILD_CUDA=0 skips dlops._cuda and 1 makes it an error if it cannot be built; CUDA_HOME chooses the toolkit,
TORCH_CUDA_ARCH_LIST the architectures. DLOPS_BUILD_SIMT=0 or 1 skips or builds dlops._simt wherever that is, and
"address" builds it with AddressSanitizer and UBSan in place of its own checks, "debug" without optimisation.
Rebuilds compile only what changed, headers included.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from time import perf_counter
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 11)
DEFAULT_ARCHS = ["8.0", "9.0a", "10.0a", "12.0+PTX"]
# Only the stable ABI of the oldest torch: one binary serves every newer one.
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"
CXX_FLAGS = shlex.split(
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall"
)
# Run on this machine alone; fused multiply-add as on the device, frames and lines for the reports and the debugger.
SIMT_FLAGS = shlex.split("-O2 -g -march=native -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -Wall -DDLOPS_SIMT")
# A loop past an array's end keeps the trip count it was written with.
SIMT_KERNEL_FLAGS = shlex.split("-fno-aggressive-loop-optimizations -Wno-unknown-pragmas -xc++")
# Every access calls csrc/simt/hooks.cpp: memcpy and its kin stay calls, and no loop becomes one.
SIMT_CHECK_FLAGS = shlex.split(
    "-fsanitize=thread,bounds,alignment -fno-builtin-memcpy -fno-builtin-memmove -fno-builtin-memset "
    "-fno-tree-loop-distribute-patterns"
)
SIMT_ADDRESS_FLAGS = shlex.split("-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer")
NVCC_FLAGS = shlex.split("-O3 -std=c++20 --threads=0 -Xcompiler=-fPIC,-fvisibility=hidden")
PATH_FLAGS = [f"-I{CSRC}", f"-ffile-prefix-map={ROOT}=."]  # no path of the build machine in the binary
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


class Missing(Exception):
    """Something that a build needs is not there; the message names it."""


def say(text: str) -> None:
    print(f"dlops: {text}", file=sys.stderr, flush=True)


def stop(text: str) -> SystemExit:
    return SystemExit(f"dlops: {text}")


# ---- what is there -------------------------------------------------------------------------------------------------


def find_cxx() -> list[str]:
    """The C++ compiler's command, which may begin with a launcher such as ccache."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise stop(f"CXX names a compiler that is not there: {chosen[0]}")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise Missing("a C++ compiler (c++, g++ or clang++ on PATH, or CXX)")


class Torch:
    """The torch that is built against: its version, the flags to compile and link with."""

    def __init__(self) -> None:
        absent = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
        if not shutil.which("ninja") and importlib.util.find_spec("ninja") is None:
            absent.append("ninja")
        if absent:
            raise stop(f"without build isolation, install these first: {', '.join(absent)}")
        import pybind11
        import torch

        self.module = torch
        self.version = str(torch.__version__)
        if tuple(int(part) for part in self.version.split(".")[:2]) < OLDEST_TORCH:
            raise stop(f"torch {self.version} is here, dlops needs torch >= {'.'.join(map(str, OLDEST_TORCH))}")
        root = Path(torch.__file__).parent
        folders = [root / "include", sysconfig.get_paths()["include"], pybind11.get_include()]
        self.compile = [f"-isystem{folder}" for folder in folders]
        self.compile += [f"-ffile-prefix-map={root}=torch", TORCH_TARGET, f'-DDLOPS_TORCH_VERSION="{self.version}"']
        self.link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]


class Toolkit:
    """A CUDA toolkit, as its own nvcc describes it: the one on PATH may be a wrapper far from the toolkit."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
        if home is None and (found := shutil.which("nvcc")):
            nvcc = Path(found)
        if not nvcc.exists():
            where = f"in CUDA_HOME ({home}/bin)" if home else "on PATH, or CUDA_HOME"
            raise Missing(f"a CUDA toolkit (nvcc {where})")
        says = self._ask(nvcc, "-v", "--dryrun", "x.cu")
        top = re.search(r"^#\$ TOP=(.+)$", says, re.MULTILINE)
        if top is None:
            raise stop(
                f"{nvcc} does not say where its toolkit is; DLOPS_BUILD_CUDA=0 builds without CUDA. It says:\n{says}"
            )
        self.root = Path(top[1].strip()).resolve()
        includes, libraries = (self._flags(says, name) for name in ("INCLUDES", "LIBRARIES"))
        self.compile = [
            "-DUSE_CUDA",
            *[flag.replace("-I", "-isystem", 1) for flag in includes],
            f"-isystem{self.root}/include",
        ]
        if not any(
            (Path(flag.removeprefix("-isystem")) / "cuda_runtime.h").exists()
            for flag in [*self.compile, "/usr/include"]
        ):
            raise Missing(f"the CUDA runtime's headers (cuda_runtime.h of the toolkit in {self.root})")
        # The runtime is linked in: whichever CUDA torch was built for, only the driver must know this one.
        self.link = [*libraries, f"-L{self.root}/lib64", "-ltorch_cuda", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.nvcc = self.root / "bin" / "nvcc" if (self.root / "bin" / "nvcc").exists() else nvcc
        version = re.search(r"release ([\d.]+)", self._ask(self.nvcc, "--version"))
        self.version = version[1] if version else "unknown"

    @staticmethod
    def _ask(nvcc: Path, *question: str) -> str:
        answer = subprocess.run([nvcc, *question], capture_output=True, text=True)
        return answer.stdout + answer.stderr

    @staticmethod
    def _flags(says: str, name: str) -> list[str]:
        found = re.search(rf"^#\$ {name}=(.*)$", says, re.MULTILINE)
        return shlex.split(found[1]) if found else []

    def archs(self, torch: Any) -> list[str]:
        """Compute capabilities to build for, like "9.0a" or "12.0+PTX"."""
        if chosen := re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")):
            for arch in filter(None, chosen):
                if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                    raise stop(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, accepted are entries like 8.0, 9.0a and 12.0+PTX")
            if chosen != [""]:
                return chosen
        known = re.findall(r"sm_(\d+)", self._ask(self.nvcc, "--list-gpu-code"))
        if torch.cuda.is_available():
            here = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
            archs = [f"{major}.{minor}{'a' if major in (9, 10) else ''}" for major, minor in here]
        else:
            archs = [arch for arch in DEFAULT_ARCHS if _digits(arch) in known]
        unknown = [arch for arch in archs if _digits(arch) not in known]
        if unknown or not archs:
            wanted = ", ".join(unknown or DEFAULT_ARCHS)
            raise Missing(f"a CUDA toolkit newer than {self.version}, which cannot build for {wanted}")
        return archs


def _digits(arch: str) -> str:
    return re.sub(r"\D", "", arch)


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# ---- building ------------------------------------------------------------------------------------------------------


def nvcc(toolkit: Toolkit, compiler: list[str]) -> list[str]:
    """The command that compiles a .cu, but for the architectures."""
    host = next(word for word in compiler if Path(word).name not in ("ccache", "sccache"))
    ccbin = [] if os.environ.get("NVCC_CCBIN") else [f"-ccbin={host}"]
    return [str(toolkit.nvcc), *NVCC_FLAGS, *ccbin, f"-I{CSRC}"]


class Ninja:
    """One build.ninja: compile edges with header dependencies, and one link edge per module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = ""

    def rule(self, name: str, command: list[str], tail: str) -> None:
        self.text += f"rule {name}\n  description = {name} $out\n"
        self.text += f"  command = {shlex.join(command).replace('$', '$$')} {tail}\n"

    def compile(self, rule: str, command: list[str], sources: list[Path]) -> list[Path]:
        self.rule(rule, command, "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc")
        objects = [self.folder / rule / f"{source.stem}.o" for source in sources]
        for source, built in zip(sources, objects, strict=True):
            self.text += f"build {_escape(built)}: {rule} {_escape(source)}\n"
        return objects

    def link(self, rule: str, command: list[str], objects: list[Path], libraries: list[str], target: Path) -> None:
        self.rule(rule, command, f"$in {shlex.join(libraries)} -o $out")
        self.text += f"build {_escape(target)}: {rule} {' '.join(map(_escape, objects))}\n"

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(self.text)
        found = shutil.which("ninja")
        jobs = os.environ.get("MAX_JOBS") or str(
            len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        )
        command = [*([found] if found else [sys.executable, "-m", "ninja"]), "-j", jobs, "-C", str(self.folder)]
        if subprocess.run(command).returncode:
            raise stop("the build failed; the compiler's messages are above")


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildExt(build_ext):
    """Builds with ninja every extension that can be built here, and leaves no older build of the others behind."""

    def run(self) -> None:
        start = perf_counter()
        base = Path(self.get_finalized_command("build").build_base).resolve()
        ninja = Ninja(base / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        plans = {"dlops._C": self.plan_host, "dlops._cuda": self.plan_cuda, "dlops._simt": self.plan_simt}
        absent = {name: plan(ninja) for name, plan in plans.items()}
        built = [extension for extension in self.extensions if absent[extension.name] is None]
        if built:
            ninja.run()
        for extension in self.extensions:
            target = Path(self.build_lib, self.get_ext_filename(extension.name))
            inplace = Path(self.get_ext_fullpath(extension.name))
            target.unlink(missing_ok=True)
            if extension in built:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ninja.folder / target.name, target)
            elif self.inplace:
                inplace.unlink(missing_ok=True)
        self.extensions = built
        if self.inplace:
            self.copy_extensions_to_source()
        names = " and ".join(extension.name for extension in built)
        say(f"built {names or 'no extension'} in {perf_counter() - start:.0f} s")

    def plan_host(self, ninja: Ninja) -> str | None:
        """Adds dlops._C to the build; returns why it cannot be built, or None."""
        try:
            compiler = find_cxx()
        except Missing as missing:
            say(f"NOT building dlops._C: it needs {missing}. dlops works without it, on its other backends")
            return str(missing)
        torch = Torch()
        base = [*compiler, *CXX_FLAGS, *PATH_FLAGS]
        flags = " ".join([*CXX_FLAGS, TORCH_TARGET])
        bind = [source for source in _sources("bind/*.cpp") if not source.name.startswith(("cuda_", "simt_"))]
        objects = ninja.compile("host_bind", [*base, *torch.compile, f'-DDLOPS_FLAGS="{flags}"'], bind)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for isa in ISA_FLAGS if x86 else ("generic",):
            command = [*base, "-fno-exceptions", *ISA_FLAGS[isa], f"-DDLOPS_ISA={isa}"]  # kernels throw nothing
            objects += ninja.compile(f"host_{isa}", command, _sources("cpu/*.cpp"))
        target = ninja.folder / Path(self.get_ext_filename("dlops._C")).name
        ninja.link("host_link", [*compiler, "-shared"], objects, torch.link, target)
        return None

    def plan_cuda(self, ninja: Ninja) -> str | None:
        """Adds dlops._cuda to the build; returns why it is not built, or None."""
        forced = _switch("DLOPS_BUILD_CUDA")
        if forced == "0":
            return "DLOPS_BUILD_CUDA=0"
        try:
            compiler, toolkit, torch = find_cxx(), Toolkit(), Torch()
            built_for = torch.module.version.cuda
            if built_for is None:
                raise Missing(f"a CUDA build of torch (torch {torch.version} is not one)")
            archs = toolkit.archs(torch.module)
        except Missing as missing:
            if forced == "1":
                raise stop(f"DLOPS_BUILD_CUDA=1, but building dlops._cuda needs {missing}") from None
            say(f"not building dlops._cuda: it needs {missing}")
            return str(missing)
        say(f"building dlops._cuda for {', '.join(archs)} with CUDA {toolkit.version} in {toolkit.root}")
        if built_for.split(".")[0] != toolkit.version.split(".")[0]:
            say(f"torch was built for CUDA {built_for}; dlops._cuda will need a driver for CUDA {toolkit.version}")
        objects = ninja.compile("cuda_nvcc", [*nvcc(toolkit, compiler), *gencode(archs)], _sources("cuda/*.cu"))
        command = [*compiler, *CXX_FLAGS, *PATH_FLAGS, *torch.compile, *toolkit.compile]
        bind = [source for source in _sources("bind/*.cpp") if source.name.startswith(("cuda_", "check"))]
        objects += ninja.compile("cuda_bind", [*command, f'-DDLOPS_CUDA_ARCHS="{";".join(archs)}"'], bind)
        target = ninja.folder / Path(self.get_ext_filename("dlops._cuda")).name
        ninja.link("cuda_link", [*compiler, "-shared"], objects, [*torch.link, *toolkit.link], target)
        return None

    def plan_simt(self, ninja: Ninja) -> str | None:
        """Adds dlops._simt to the build; returns why it is not built, or None."""
        forced = _switch("DLOPS_BUILD_SIMT", "address", "debug")
        if forced == "0" or (not forced and not self.inplace):
            return "for tests, and not asked for"
        try:
            compiler, torch = find_cxx(), Torch()
            if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
                raise Missing(f"an x86-64 or ARM64 CPU, not {platform.machine()}")
        except Missing as missing:
            if forced:
                raise stop(f"DLOPS_BUILD_SIMT=1, but building dlops._simt needs {missing}") from None
            say(f"not building dlops._simt: it needs {missing}")
            return str(missing)
        base = [*compiler, *SIMT_FLAGS, *PATH_FLAGS, *(["-O0"] if forced == "debug" else [])]
        sanitizer = SIMT_ADDRESS_FLAGS if forced == "address" else []
        objects = ninja.compile("simt_runtime", [*base, *sanitizer], _sources("simt/*.cpp"))
        objects += ninja.compile(
            "simt_kernels", [*base, *SIMT_KERNEL_FLAGS, *(sanitizer or SIMT_CHECK_FLAGS)], _sources("cuda/*.cu")
        )
        bind = [source for source in _sources("bind/*.cpp") if source.name.startswith(("cuda_", "simt_", "check"))]
        bind = [source for source in bind if source.name != "cuda_module.cpp"]
        checks = "addresses" if sanitizer else "races"
        objects += ninja.compile("simt_bind", [*base, *torch.compile, f'-DDLOPS_SIMT_CHECKS="{checks}"'], bind)
        target = ninja.folder / Path(self.get_ext_filename("dlops._simt")).name
        ninja.link("simt_link", [*compiler, "-shared", "-pthread", *sanitizer], objects, [*torch.link, "-ldl"], target)
        return None

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, self.get_ext_filename(extension.name))) for extension in self.extensions]


def _switch(name: str, *others: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1", *others):
        raise stop(f"{name}: got {value!r}, accepted are {', '.join(('0', '1', *others))}")
    return value


def _sources(pattern: str) -> list[Path]:
    return sorted(CSRC.glob(pattern))


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"dlops.{name}", []) for name in ("_C", "_cuda", "_simt")],
        cmdclass={"build_ext": BuildExt},
        # The folder kernels/ is installed inside dlops: another package on PyPI has its name.
        packages=[*find_packages(include=["dlops", "dlops.*"]), "dlops.kernels"],
        package_dir={"dlops": "dlops", "dlops.kernels": "kernels"},
    )
