"""queries.sql by name, and how values get into a statement.

Values travel as parameters, or, in COPY, which takes none, as literals that
psycopg quotes. What stands in braces in queries.sql is put in from closed lists.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql


def load_statements(path: Path) -> dict[str, sql.SQL]:
    """The statements of a file by name; the file's head explains its format."""
    statements = {}
    for part in re.split(r"^-- name: ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        name, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line and not line.startswith("--")]
        statements[name.strip()] = sql.SQL("\n".join(lines).removesuffix(";"))
    return statements


STATEMENTS = load_statements(Path(__file__).parent.parent / "queries.sql")


@functools.lru_cache(maxsize=256)
def find_placeholders(statement: str) -> frozenset[str]:
    """The names of a statement's parameters."""
    return frozenset(re.findall(r"(?<!%)%\((\w+)\)s", statement))


# What read_text makes of bytes that are not text.
ODD = re.compile("[\udc80-\udcff]")


def write_literal(connection: psycopg.Connection[Any], value: Any) -> str:
    """A value as a literal; bytes that read_text could not read are the same bytes in it again.

    What is composed already, a part of the statement that is made for this request, stays as it is.
    """
    if isinstance(value, sql.Composable):
        return value.as_string(connection)
    if isinstance(value, list) and not all(isinstance(one, str | None) for one in value):
        return sql.Literal(value).as_string(connection)
    text = write_array(value) if isinstance(value, list) else value
    if not (isinstance(text, str) and ODD.search(text)):
        return sql.Literal(text).as_string(connection)
    quoted = text.replace("\\", "\\\\").replace("'", "''")
    return "E'" + ODD.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", quoted) + "'"


def write_array(texts: list[str | None]) -> str:
    """Texts as PostgreSQL reads an array of them. By psycopg, an element at a time, it takes several times as long."""
    joined = "".join(filter(None, texts))
    if "\\" in joined or '"' in joined:
        texts = [text and text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]
    return "{" + ",".join(["NULL" if text is None else f'"{text}"' for text in texts]) + "}"


def mogrify(connection: psycopg.Connection[Any], statement: str, parameters: Mapping[str, Any]) -> bytes:
    """A statement with its parameters in it as literals."""
    literals = {name: write_literal(connection, parameters[name]) for name in find_placeholders(statement)}
    return (statement % literals).encode()


def decode(text: bytes, codec: str | None) -> bytes:
    """Text of a database in UTF-8: what cannot be read becomes U+FFFD."""
    return text.decode(codec, "replace").encode() if codec else text


def read_text(stored: str | None, codec: str | None) -> str | None:
    """Text of a database by its bytes in hex, which write_literal gives back; show_text is for people."""
    return None if stored is None else bytes.fromhex(stored).decode(codec or "utf-8", "surrogateescape")


def show_text(text: str | None, codec: str | None) -> str | None:
    """What read_text read, with U+FFFD for what cannot be read."""
    encoding = codec or "utf-8"
    return None if text is None else text.encode(encoding, "surrogateescape").decode(encoding, "replace")


def show_name(stored: str, codec: str | None) -> str:
    """The same of bytes in hex."""
    return show_text(read_text(stored, codec), codec) or ""


def can_hold(codec: str | None, value: Any) -> bool:
    """Whether a database whose text has a codec of Python's can hold a value."""
    try:
        str(value).encode(codec or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def number_placeholders(query: str, names: Iterable[str], fixed: Mapping[str, str] | None = None) -> str:
    """A query with $1, $2, … for its parameters, but for those whose text is fixed."""
    numbers = {name: f"${n}" for n, name in enumerate(names, 1)}
    return str(query % {**numbers, **(fixed or {})})
