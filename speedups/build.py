"""Builds the C encoder for the Python that runs this: python speedups/build.py [FOLDER]

Into a folder, or else among that Python's packages. Nothing needs the encoder, so whoever calls this goes on
whatever it returns: 0 if it is built, 1 if the compiler failed, 2 if there is no compiler or no Python.h. Then no
older build is left either. CC and CFLAGS are the compiler and what else it is told.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cdr_encoder.c")
NAME = "cdr_encoder.abi3.so"  # which every Python from 3.11 on loads
TRIAL = "import cdr_encoder; assert cdr_encoder.encode([b'1\\n'], b'{', (b',',), b'}') == b'{1}'"


def find_compiler() -> list[str]:
    """CC, or the one that made this Python, or cc; nothing if none of them is there."""
    for found in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc"):
        command = shlex.split(found or "")
        if command and shutil.which(command[0]):
            return command
    return []


def compose_command(compiler: list[str], target: Path) -> list[str]:
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    includes = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    return [*compiler, "-std=c11", "-O2", "-fPIC", *shared, *includes, *flags, str(SOURCE), "-o", str(target)]


def build(folder: Path, compiler: list[str]) -> bool:
    """Whether it is there now, and works."""
    target = folder / NAME
    target.unlink(missing_ok=True)
    # Not written in its place, from where a service that runs may have loaded the one before.
    with tempfile.TemporaryDirectory(dir=folder) as made:
        trial = [sys.executable, "-c", TRIAL]
        for command in (compose_command(compiler, Path(made, NAME)), trial):
            if subprocess.run(command, env=os.environ | {"PYTHONPATH": made}, check=False).returncode:
                return False
        Path(made, NAME).replace(target)
    return True


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("platlib"))
    compiler = find_compiler()
    if not compiler or not Path(sysconfig.get_path("include"), "Python.h").exists():
        (folder / NAME).unlink(missing_ok=True)
        print("Without the C encoder, for which a C compiler or Python.h is missing; JSON takes a little longer.")
        return 2
    if not build(folder, compiler):
        print("Without the C encoder, which could not be built (see above); JSON takes a little longer.")
        return 1
    print("Built the C encoder.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
