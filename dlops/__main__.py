"""``python -m dlops``: what is installed, built and available, and why not.

Exit status 1 if kernels are missing although a compiler is here.
"""

import importlib
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

import dlops


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shadowed() -> str | None:
    """Whether this is a clone's folder that hides an installed dlops."""
    here = Path(dlops.__file__).resolve().parent
    for path in sys.path[1:]:
        installed = Path(path or ".").resolve() / "dlops"
        if installed != here and any(installed.glob("_C*")):
            return f"the folder {here} hides the dlops installed at {installed}: run from another folder"
    return None


def main() -> int:
    print(f"dlops     {dlops.__version__} ({Path(dlops.__file__).parent})")
    print(f"python    {platform.python_version()} on {platform.machine()}")
    print(f"torch     {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    for package in ("triton", "numpy"):
        print(f"{package:9s} {_version(package)}")
    print(f"threads   {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        print(
            f"gpu {i}     {torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        )
    if not torch.cuda.is_available():
        print("gpu       none")
    for name in ("_C", "_cuda"):
        try:
            module = importlib.import_module(f"dlops.{name}")
        except ImportError as error:
            print(f"dlops.{name}: not loaded ({error})")
            continue
        facts = {**module.build_info(), **(module.cpu_features() if name == "_C" else {})}
        print(f"dlops.{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print("backends")
    for name, reason in dlops.backends().items():
        print(f"  {name:8s} {'available' if reason is None else reason}")
    if (hidden := _shadowed()) is not None:
        print(hidden)
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return int(compiler and dlops.backends()["cpu"] is not None)


if __name__ == "__main__":
    sys.exit(main())
