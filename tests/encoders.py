"""The C encoder beside the Python one: built for the tests, taken or left by a process, and batches for both."""

from __future__ import annotations

import array
import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from cdr.stream import JsonEncoder

MODULE = "cdr_encoder"
BUILD = Path(__file__).parent.parent / "speedups/build.py"

Encode = Callable[[list[memoryview], bytes, tuple[bytes, ...], bytes], bytes | None]


def build_encoder(folder: Path, python: str = sys.executable, **variables: str) -> str:
    """Builds it into a folder; nothing, or that the machine lacks something. Fails if the compiler does."""
    command = [python, str(BUILD), str(folder)]
    done = subprocess.run(command, env=variables or None, check=False, capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return done.stdout if done.returncode else ""


def load_encoder(folder: Path) -> Encode:
    """encode() of the one in a folder, even if another is installed."""
    spec = importlib.util.spec_from_file_location(MODULE, folder / f"{MODULE}.abi3.so")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Encode, module.encode)


def hide_encoder(folder: Path) -> Path:
    """A folder that, in PYTHONPATH, leaves a process without it."""
    (folder / f"{MODULE}.py").write_text("raise ImportError\n", "ascii")
    return folder


def as_views(rows: Sequence[bytes]) -> list[memoryview]:
    """As libpq hands them over, each in memory of just its size, so that a sanitizer sees a byte too many."""
    return [memoryview(array.array("B", row)[:]) for row in rows]


def take(encode: Encode, fields: Sequence[str], rows: Sequence[bytes]) -> bytes | None:
    """What C makes of a batch, if anything; fails if that is not what the Python encoder makes."""
    reference = JsonEncoder(fields, b",\n")
    made: bytes | None = encode(as_views(rows), b"[" + reference.head, tuple(reference.row[::2]), b"}")
    assert made is None or made == reference(as_views(rows), b"["), (fields, rows)
    return made


# Batches ----------------------------------------------------------------------

CONTROLS = bytes(range(32))
SPECIAL = b'"\\\x7f\n' + CONTROLS + b"nul1\x80\xc3\xe6\xf0\xff"
BARE = (b"null", b"null", b"0", b"-1", b"1234567", b"12345678", b"3.60", b"true", b"false", b"1" * 40)
TEXTS = (
    *(b"", b"\\N", b"\\.", b"null", b'"', b'""', b"\x7f", b"\x7f\x7f", b'\\"', b"\\", b'"\x7f"', b"\r\n", CONTROLS),
    *("é漢📞\u2028".encode(), b"\xff\xfe\xc3", b"00050dd0-4474-fc21-6cbd-ddec1ed808c5", b"alpha.example.com"),
)


def write_string(text: bytes) -> bytes:
    """As copy_json has it (queries.sql)."""
    return b'"' + text.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def write_row(cells: Sequence[bytes]) -> bytes:
    return b"\x7f".join(cells) + b"\n"


class Batches:
    """Batches by chance: as COPY writes them, changed here and there, and of bytes alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> bytes:
        kind = self.random.random()
        if kind < 0.5:
            return self.random.choice(TEXTS)
        size = self.random.choice((1, 6, 7, 8, 9, 16, 40, 40, 3000 if kind > 0.999 else 20))
        return self.random.randbytes(size) if kind < 0.6 else bytes(self.random.choices(SPECIAL, k=size))

    def cell(self) -> bytes:
        return self.random.choice(BARE) if self.random.random() < 0.5 else write_string(self.text())

    def fields(self) -> list[str]:
        width = self.random.choice((1, 1, 2, 3, 3, 5, 9, 66))
        return [self.random.choice(("a", "caller_id_name", 'é"\\\n', "")) for _ in range(width)]

    def rows(self, width: int) -> list[bytes]:
        return [write_row([self.cell() for _ in range(width)]) for _ in range(self.random.choice((1, 1, 2, 3, 20)))]

    def change(self, row: bytes) -> bytes:
        """Makes a row that COPY would not write, or that it might."""
        changed = bytearray(row)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            at = self.random.randint(0, len(changed))
            behind = at + self.random.choice((0, 1, 1, 2, 8))
            some = bytes(self.random.choices(SPECIAL, k=self.random.choice((0, 0, 1, 1, 2, 9))))
            changed[at:behind] = some if self.random.random() < 0.8 else changed[at:behind] * 2
        return bytes(changed)

    def noise(self) -> list[bytes]:
        sizes = self.random.choices((0, 1, 2, 3, 7, 8, 9, 17, 60), k=self.random.choice((1, 1, 3)))
        return [bytes(self.random.choices(SPECIAL, k=size)) + b"\n"[: self.random.randint(0, 1)] for size in sizes]
