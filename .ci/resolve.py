"""Checks that what pyproject.toml offers can be installed wherever its users are. Reads metadata only; needs uv.

Within constraints.txt: the extras demo, test and dev from wheels alone, so that nothing is compiled, on each platform and
Python, and every extra together. Without constraints.txt, as `pip install "qriemann @ git+..."` installs it: the demo.
PyTorch's CPU builds require a part of what its CUDA builds require, so they resolve where these do.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "x86_64-pc-windows-msvc", "aarch64-apple-darwin")
PYTHONS = ("3.11", "3.12", "3.13")
PINNED = "-c constraints.txt"
REQUESTS = [
    f"{PINNED} --extra demo --extra test --extra dev --only-binary :all: --python-platform {platform} "
    f"--python-version {python}"
    for platform, python in itertools.product(PLATFORMS, PYTHONS)
] + [f"{PINNED} --all-extras --universal --python-version 3.11", "--extra demo --universal --python-version 3.11"]
# What torch brings for CUDA, what a virtual environment may hold already, and what only browsers need.
UNPINNED = re.compile(r"(cuda|nvidia)-|setuptools$|httpx2-jsfetch$")
ENVIRONMENT = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0", "UV_PYTHON_DOWNLOADS": "never"}


def resolve(request: str) -> subprocess.CompletedProcess[str]:
    """Resolves the project with these options; the standard output lists the packages."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--no-annotate", *request.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def main() -> int:
    """Prints what is wrong and returns 1, or one line and 0."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", Path("constraints.txt").read_text(), re.MULTILINE))
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    requirements = "\n".join(itertools.chain(project["dependencies"], *project["optional-dependencies"].values()))
    wrong = [
        f"pyproject.toml asks for {name}>={bound}, but the tests run with {pins.get(name.lower())} (constraints.txt)"
        for name, bound in re.findall(r"^([\w.-]+)>=([\w.]+)", requirements, re.MULTILINE)
        if pins.get(name.lower()) != bound
    ]
    with ThreadPoolExecutor(4) as pool:
        for request, done in zip(REQUESTS, pool.map(resolve, REQUESTS), strict=True):
            if done.returncode:
                wrong.append(f"uv pip compile pyproject.toml {request}\n{done.stderr}")
            elif PINNED in request:
                names = {
                    name for name in re.findall(r"^([\w.-]+)==", done.stdout, re.MULTILINE) if not UNPINNED.match(name)
                }
                wrong += [f"constraints.txt must pin {name}" for name in sorted(names - pins.keys())]
    print("\n".join(dict.fromkeys(wrong)) or f"{len(REQUESTS)} installs resolve")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
