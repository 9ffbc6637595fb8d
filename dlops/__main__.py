"""``python -m dlops``: what is installed, built and available, and for what is not, why and how to get it.

Exit status 1 if kernels are missing although their compiler is here.
"""

import importlib
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

import dlops
from dlops import backend

HERE = Path(dlops.__file__).resolve().parent


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def line(name: str, text: object) -> None:
    print(f"{name:12s} {text}")


def load(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(f"dlops.{name}")
    except ImportError as error:
        return error


def describe(module: ModuleType | ImportError) -> str:
    """What an extension module says about itself, or why it is not here."""
    if isinstance(module, ImportError):
        return f"not built, or not loadable ({module})"
    info = module.build_info()
    kinds = info.get("isas") or info.get("architectures", "tests on the host").split(";")
    return f"built with {info['compiler']} against torch {info['torch']}, for {', '.join(kinds)}"


def devices() -> None:
    isa = ""
    if not dlops.backends()["cpu"]:
        features = importlib.import_module("dlops._C").cpu_features()
        isa = f"{features['vendor']}, kernels run with {features['isa']}, "
    line("cpu", f"{isa}{torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        line(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    if not torch.cuda.is_available():
        line("cuda", "no GPU available to torch")


def shadowing() -> str | None:
    """Where another dlops is installed, which the one of the current folder hides."""
    for path in sys.path[1:]:
        installed = Path(path).resolve() / "dlops"
        if installed != HERE and (installed / "__init__.py").exists():
            return str(installed)
    return None


def main() -> int:
    line("dlops", f"{dlops.__version__} in {HERE}")
    line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    line("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    for package in ("triton", "numpy"):
        line(package, version(package))
    print("\ndevices")
    devices()
    print("\nextensions")
    modules = {name: load(name) for name in ("_C", "_cuda", "_simt")}
    for name, module in modules.items():
        line(f"dlops.{name}", describe(module))
    print("\nbackends")
    for name, reason in dlops.backends().items():
        available = "emulated on the host, for tests" if name == "cuda" and backend.cuda_emulated() else "available"
        line(name, available if reason is None else f"not available: {reason}")

    cxx = any(map(shutil.which, ("c++", "g++", "clang++")))
    compiler = {"_C": cxx, "_cuda": cxx and shutil.which("nvcc") and torch.version.cuda}
    missing = [f"dlops.{name}" for name in compiler if compiler[name] and isinstance(modules[name], ImportError)]
    if missing and (hidden := shadowing()):
        print(f"\nThe folder {HERE} hides the dlops installed in {hidden}: run Python from another folder.")
    elif missing:
        print(f"\n{' and '.join(missing)}: not here, but the compiler is. Install dlops again and read what it prints.")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
