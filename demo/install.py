"""What make needs, installed into .venv, with progress: python3 demo/install.py FOLDER run|test|service

It runs before anything is installed, by any Python from 3.11 on. Whatever fails ends it with one sentence.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORT = os.environ.get("PORT") or "8000"
FIRST = "The first time this takes a minute or two, most of it for downloads."
RUN_PLAN = f"make run: 1. installs Python packages into .venv (125 MB); 2. {{}} on http://127.0.0.1:{PORT}.\n{FIRST}"
PLANS = {  # what is installed, MB that it takes, what comes
    "run": (
        "demo/requirements.txt",
        500,
        RUN_PLAN.format("starts a PostgreSQL of its own in .demo, invents 100,000 calls (150 MB) and serves them"),
    ),
    "service": ("requirements.txt", 100, "Installs the libraries of the service into .venv (20 MB)."),
    "test": (
        "tests/requirements.txt",
        1000,
        f"Installs what the tests need into .venv (500 MB); what make was asked for comes after that. {FIRST}",
    ),
}
NO_NETWORK = (
    "The Python package index cannot be reached: is there a network? Behind a proxy set HTTPS_PROXY, with a mirror"
    " PIP_INDEX_URL."
)
# What pip or venv says, and what that means.
REMEDIES = {
    r"No space left|Errno 28\b": "The disk is full: free 1 GB and start again.",
    r"Errno (13|30)\b|[Pp]ermission denied|[Rr]ead-only": "{root} cannot be written to: copy it elsewhere.",
    r"ensurepip": "Python's venv module is missing or broken; on Debian and Ubuntu: apt install python3-venv",
    r"PATH separator": "Python makes no virtual environment in a path with a colon: move {root} elsewhere.",
    r"DO NOT MATCH THE HASHES": "A package is not the one that was locked: does a proxy or mirror change files?",
    r"Connection|[Tt]imed? ?out|resolution|unreachable|ProxyError|SSLError|\b(403|407|5\d\d) ": NO_NETWORK,
    r"No matching distribution": "This Python or system has no ready-made package; try PYTHON=python3.12 make …",
}


def fail(said: str, log: Path | None = None) -> None:
    """Ends the program with the sentence that fits what was said, and where all of it stands."""
    sentences = (sentence.format(root=ROOT) for pattern, sentence in REMEDIES.items() if re.search(pattern, said))
    lines = [line for line in said.splitlines() if line.strip()] or ["Nothing was said."]
    where = f" ({log} has all of it.)" if log else ""
    sys.exit(f"\nmake cannot go on. {next(sentences, lines[-1])}{where}")


def make_venv(folder: Path) -> Path:
    """The folder's Python; makes the folder where it is not there, or was not finished."""
    python = folder / "bin/python"
    works = python.exists() and subprocess.run([str(python), "-c", "import pip"], capture_output=True, check=False)
    if not works or works.returncode:
        command = [sys.executable, "-m", "venv", "--clear", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            fail(done.stdout + done.stderr)
    return python


def read_progress(lines: Iterator[str], total: int) -> Iterator[str]:
    """What to show for pip's lines."""
    count = 0
    for line in lines:
        if found := re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line):
            count = min(count + 1, total)
            yield f"{count} of {total}: {found[1]}"
        elif line.startswith("Installing collected packages"):
            yield "all downloaded, unpacking"


def keep(lines: Iterable[str], said: list[str]) -> Iterator[str]:
    for line in lines:
        said.append(line)
        yield line


def install(python: Path, requirements: Path, log: Path) -> None:
    """Runs pip, and shows how far it is."""
    total = len(re.findall(r"^[\w.-]+==", requirements.read_text("utf-8"), re.MULTILINE))
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--require-hashes", "-r", str(requirements)]
    environ = {"PIP_RETRIES": "2", **os.environ, "PIP_USER": "0", "PIP_QUIET": "0"}
    pipe, begun, said = subprocess.PIPE, time.monotonic(), list[str]()
    before, behind = ("\r\x1b[K", "") if sys.stdout.isatty() else ("", "\n")  # one line that changes, where it can
    with subprocess.Popen(
        command, env=environ, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for text in read_progress(keep(process.stdout or (), said), total):
            print(f"{before}Installing: {text}", end=behind, flush=True)
    log.write_text("".join(said), "utf-8")
    if process.returncode:
        fail("".join(said), log)
    print(f"{before}Installed {total} packages in {time.monotonic() - begun:.0f} seconds.", flush=True)


def build_encoder(python: Path) -> None:
    """The optional C encoder; whether it is built, its program says."""
    subprocess.run([str(python), str(ROOT / "speedups/build.py")], check=False)


def main() -> None:
    folder, plan = Path(sys.argv[1]), sys.argv[2]
    requirements, megabytes, text = PLANS[plan]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know no "…"
    if plan == "run" and os.environ.get("CDR_API_DSN"):
        text = RUN_PLAN.format("serves the database of CDR_API_DSN")
    print(text, flush=True)
    if shutil.disk_usage(ROOT).free < megabytes * 1_000_000:
        sys.exit(f"make cannot go on. It needs {megabytes} MB on the disk of {ROOT}: free them and start again.")
    try:
        python = make_venv(folder)
        install(python, ROOT / requirements, folder / "install.log")
        build_encoder(python)
    except OSError as error:
        fail(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the next make goes on from here.")
