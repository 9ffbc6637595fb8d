"""Prints the packages of the extra "dev", one a line: what the Makefile installs before it builds dlops."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
for extra in ("bench", "dev"):
    block = re.search(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert block is not None, f"pyproject.toml has no extra {extra}"
    for package in re.findall(r'"([^"]+)"', block[1]):
        if not package.startswith("dlops"):
            print(package)
