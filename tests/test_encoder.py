"""The C encoder: optional, and the same bytes as the Python one. tests/test_stream.py runs on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from cdr.stream import CompiledJsonEncoder, JsonEncoder
from tests.clients import fetch
from tests.conftest import ROOT, DatabaseMaker, serve
from tests.encoders import SPECIAL, Encode, as_views, build_encoder, hide_encoder, load_encoder, take, write_string
from tests.values import ANYTHING, FIXED, NASTY

pytestmark = pytest.mark.direct("needs no way to a database; tests/test_stream.py runs both encoders by any")


@pytest.fixture(scope="module")
def encode(speedups: Path) -> Encode:
    return load_encoder(speedups)


# Bytes ------------------------------------------------------------------------

VALUES = st.none() | st.booleans() | st.integers() | NASTY | ANYTHING | FIXED | st.text(max_size=300)


def write_cell(value: str | int | None) -> bytes:
    return (
        write_string(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else json.dumps(value).encode()
    )


@hypothesis.given(st.integers(1, 70).flatmap(lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width))))
@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_what_copy_writes_becomes_the_same_json(encode: Encode, rows: list[list[Any]]) -> None:
    hypothesis.assume(rows)
    fields = [f"field {number}" for number in range(len(rows[0]))]
    made = take(encode, fields, [b"\x7f".join(map(write_cell, row)) + b"\n" for row in rows])
    assert made
    text = made.decode("utf-8", "surrogatepass") + "]"
    assert json.loads(text) == [dict(zip(fields, row, strict=True)) for row in rows]


ODD = st.binary(max_size=30) | st.lists(st.sampled_from(list(SPECIAL)), max_size=30).map(bytes)


@hypothesis.given(st.lists(ODD | ODD.map(lambda row: row + b"\n"), max_size=5), st.integers(1, 4))
@hypothesis.settings(max_examples=1000, deadline=None)
def test_any_other_bytes_do_too_or_are_left_to_python(encode: Encode, rows: list[bytes], width: int) -> None:
    take(encode, ["a"] * width, rows)


def test_every_byte_at_every_place_of_a_string(encode: Encode) -> None:
    """It looks at eight bytes at once."""
    for byte in range(256):
        for before in range(18):
            for behind in (0, 7, 9):
                text = b"a" * before + bytes([byte]) + b"b" * behind
                assert take(
                    encode, ["a", "b"], [write_string(text) + b"\x7fnull\n", b"1\x7f" + write_string(text) + b"\n"]
                )


def test_many_rows_wide_rows_and_long_values(encode: Encode) -> None:
    assert take(encode, ["a"], [b"1\n"] * 100_000)
    assert take(encode, [str(number) for number in range(5000)], [b"\x7f".join([b"null"] * 5000) + b"\n"] * 3)
    long = write_string(b'<a>\n\x7f"\\\x01' * 200_000)
    assert take(encode, ["a", "b"], [b"1\x7f" + long + b"\n", long + b"\x7fnull\n"])


UNUSUAL = {
    "nothing": b"",
    "a line end alone": b"\n",
    "no line end": b"1\x7f2",
    "too few cells": b"1\n",
    "too many": b"1\x7f2\x7f3\n",
    "an empty cell": b"\x7f1\n",
    "an empty one at the end": b"1\x7f\n",
    "a string without an end": b'1\x7f"a\n',
    "one that ends in its escape": b'1\x7f"a\\\n',
    "something behind a string": b'"a"b\x7f1\n',
    "a quotation mark in a number": b'1"\x7f2\n',
    "a control character outside of strings": b"1\r\x7f2\n",
    "an escape of something else": b'"\\n"\x7f1\n',
}


@pytest.mark.parametrize("row", UNUSUAL.values(), ids=UNUSUAL)
def test_a_row_that_copy_never_writes_is_left_to_python(encode: Encode, row: bytes) -> None:
    usual = b'"\x7f"\x7fnull\n'
    assert take(encode, ["a", "b"], [usual])
    for rows in ([row], [usual, row], [row, usual]):
        assert take(encode, ["a", "b"], rows) is None
    assert take(encode, ["a", "b"], []) is None


def test_a_batch_that_is_left_comes_from_python(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdr.stream.encode_rows", encode)
    for row in (b'"a"\x7f1\n', b'"a"b\x7f1\n'):
        made = [encoder(["a", "b"], b"\n")(as_views([row]), b"") for encoder in (CompiledJsonEncoder, JsonEncoder)]
        assert made[0] == made[1]


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, ()),
        (TypeError, ([], b"", (b"",))),
        (TypeError, ((b"1\n",), b"", (b"",), b"")),
        (TypeError, (["1\n"], b"", (b"",), b"")),
        (TypeError, ([None], b"", (b"",), b"")),
        (TypeError, ([b"1\n"], "", (b"",), b"")),
        (TypeError, ([b"1\n"], b"", [b""], b"")),
        (TypeError, ([b"1\n"], b"", ("",), b"")),
        (TypeError, ([b"1\n"], b"", (b"",), None)),
        (BufferError, ([memoryview(b"1\n1\n")[::2]], b"", (b"",), b"")),
    ],
)
def test_anything_but_rows_and_bytes_is_an_error(
    encode: Callable[..., Any], error: type[Exception], arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(error):
        encode(*arguments)


def test_it_keeps_nothing(encode: Callable[..., Any]) -> None:
    """No reference and no memory, whether it makes something of a batch, leaves it, or fails."""
    first, keys = b'{"a":', (b'},{"a":', b',"b":')
    batches: list[list[Any]] = [[b'"\n"\x7f1\n'] * 9, [b"1\x7f2\n", b"1\n"], [b"1\x7f2\n", None]]

    def use(times: int) -> tuple[list[int], int]:
        for rows in batches * times:
            with suppress(TypeError):
                encode(rows, first, keys, b"}")
        held = [first, keys, *keys, *(row for rows in batches for row in rows if row)]
        return [sys.getrefcount(one) for one in held], tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        (counts, before), (counts_after, after) = use(10), use(1000)
    finally:
        tracemalloc.stop()
    assert counts == counts_after
    assert after - before < 1000


# Answers ----------------------------------------------------------------------

PATHS = [
    "calls?domain_name=alpha.example.com",
    "calls?domain_name=alpha.example.com&format=ndjson&fields=caller_id_name,xml,billsec",
    "calls?domain_name=alpha.example.com&limit=7",
    "call_feed?from=2020-01-01&fields=xml_cdr_uuid,caller_id_name",
    "call_totals?from=2026-02-03&to=2026-02-03&group_by=domain_name,accountcode",
    "domains",
]


def test_with_it_and_without_a_service_gives_the_same_answers(
    make_database: DatabaseMaker, speedups: Path, tmp_path: Path
) -> None:
    database = make_database(calls=500, index=True)
    for number, text in enumerate(('"\x7f', '"\\\n\x01', "a\x7f\x7fb", "📞 é\u2028", "", "null", "\\N")):
        database.insert_call(caller_id_name=text, xml=text * 500, accountcode=f"{number}{text}")
    database.insert_call(end_stamp="infinity", start_stamp="-infinity")
    database.insert_call(end_stamp="0044-03-15 12:00 BC", rtp_audio_in_mos="NaN")
    token = database.account(all_domains=True)
    answers = []
    for folder in (speedups, hide_encoder(tmp_path)):
        with serve(database.dsn, PYTHONPATH=str(folder)) as gunicorn:
            answers.append([fetch(f"{gunicorn.url}/api/{path}", token) for path in PATHS])
            (pid,) = gunicorn.worker_pids()
            if sys.platform == "linux":
                assert (str(speedups) in Path(f"/proc/{pid}/maps").read_text("utf-8")) == (folder == speedups)
    for path, *pair in zip(PATHS, *answers, strict=True):
        assert [answer.status_code for answer in pair] == [200, 200], path
        assert pair[0].data == pair[1].data, path
        assert len(pair[0].data) > 100, path


# Building ---------------------------------------------------------------------


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "speedups/build.py"), str(folder)]
    return subprocess.run(command, env=os.environ | variables, check=False, capture_output=True, text=True)


def test_a_compiler_that_fails_leaves_none_not_even_an_older_one(speedups: Path, tmp_path: Path) -> None:
    (built,) = speedups.iterdir()
    (tmp_path / built.name).write_bytes(built.read_bytes())
    done = build(tmp_path, CC="false")
    assert (done.returncode, done.stdout) == (
        1,
        "Without the C encoder, which could not be built (see above); JSON takes a little longer.\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_built_but_does_not_load_is_not_kept(speedups: Path, tmp_path: Path) -> None:
    assert build(tmp_path, CFLAGS="-DPyInit_cdr_encoder=PyInit_other").returncode == 1
    assert list(tmp_path.iterdir()) == []


# Sanitizers -------------------------------------------------------------------

SECONDS = os.environ.get("FUZZ_SECONDS", "5")
SANITIZERS = (
    "-Wall -Wextra -Werror -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
)


def test_no_byte_is_read_or_written_where_none_may_be(tmp_path: Path) -> None:
    """tests/fuzz_encoder.py, with an encoder that ends at the first such byte (make fuzz: for ten minutes)."""
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    if "/" not in found.stdout:
        pytest.skip("not installed: libasan")
    # Each object in memory of its own; Python itself keeps some until its end.
    asan = {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    if lacking := build_encoder(tmp_path, **os.environ, **asan, CC="gcc", CFLAGS=SANITIZERS):
        pytest.skip(lacking)
    command = [sys.executable, "-m", "tests.fuzz_encoder", str(tmp_path), SECONDS]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | asan, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.stdout.write(done.stdout)
