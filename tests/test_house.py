"""How the program is laid out: which room may need which, how large they are, and what a new entry takes."""

from __future__ import annotations

import ast
import csv
import io
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from psycopg import generators, pq

from cdr.stream import FORMATS, Encode, Format
from tests.conftest import ROOT, SOURCES, Client, Database

ENGINE = [file for file in SOURCES if file.parent == ROOT / "cdr"]
TESTS = sorted((ROOT / "tests").glob("**/*.py"))


def each(files: Sequence[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=[str(file.relative_to(ROOT)) for file in files])


def name_module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


# Rooms ------------------------------------------------------------------------


def test_the_engine_needs_no_web_framework() -> None:
    """Nor, by way of somebody else's module, any that is loaded with it."""
    names = [name_module(file) for file in ENGINE]
    code = f"import sys, {', '.join(names)}; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"flask", "flask_httpauth", "gunicorn", "cdr_api", "cdr_admin"} & set(ast.literal_eval(done.stdout))


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = {name_module(file): file for file in [*SOURCES, *TESTS] if file.name != "__init__.py"}
    needs = {name: {n for n in imports(parse(file)) if n in known} for name, file in known.items()}
    while free := {name for name, needed in needs.items() if not needed & needs.keys()}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert needs == {}


def test_the_engine_is_listed_in_the_order_in_which_it_builds_up() -> None:
    text = (ROOT / "cdr/__init__.py").read_text("utf-8")
    listed = re.findall(r"^    ([a-z_]+)  +\S", text, re.MULTILINE)
    assert sorted(listed) == sorted(file.stem for file in ENGINE if file.stem != "__init__")
    for place, name in enumerate(listed):
        later = {f"cdr.{other}" for other in listed[place:]}
        assert not later & set(imports(parse(ROOT / f"cdr/{name}.py"))), name


@each(SOURCES)
def test_no_function_imports(file: Path) -> None:
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef):
            assert not list(imports(node)), node.name


@each(SOURCES)
def test_files_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= (900 if file.name == "cdr_api.py" else 500)
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            told = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
            assert (node.end_lineno or 0) - node.lineno + 1 - told <= 30, node.name


# Tests ------------------------------------------------------------------------


def test_no_test_file_imports_another() -> None:
    """What they share stands in a module that is named after its subject."""
    for file in TESTS:
        assert not [name for name in imports(parse(file)) if ".test_" in f".{name}"], file.name


def definitions(tree: ast.Module) -> Iterator[str]:
    """The functions, classes and values at the top of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def test_what_tests_import_from_each_other_is_defined_once() -> None:
    """A second helper of the same name is a copy, or means something else than its reader expects."""
    defined = Counter(name for file in TESTS for name in set(definitions(parse(file))))
    shared = {f"tests.{file.stem}" for file in TESTS if not file.name.startswith("test_")}
    for file in TESTS:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ImportFrom) and node.module in shared:
                for alias in node.names:
                    assert defined[alias.name] == 1, (file.name, alias.name)


# libpq ------------------------------------------------------------------------

BELOW_THE_SURFACE = re.compile(r"\bpgconn\b|\bgenerators\b|\bpq\b|errors\._|\bPQGen\b")


@each([file for file in SOURCES if file != ROOT / "cdr/database.py"])
def test_only_one_file_goes_below_the_surface_of_psycopg(file: Path) -> None:
    assert not BELOW_THE_SURFACE.findall(file.read_text("utf-8"))


NEEDED = [
    (psycopg.errors, "_WaitTimeout error_from_result"),
    (psycopg.Connection, "wait cancel_safe fileno"),
    (generators, "execute fetch_many"),
    (pq.PGconn, "send_query send_query_prepared get_copy_data consume_input transaction_status socket"),
    (pq.PGresult, "status ntuples get_value"),
    (pq.ExecStatus, "FATAL_ERROR COPY_OUT"),
    (pq.TransactionStatus, "ACTIVE IDLE"),
]


def test_psycopg_has_every_name_that_is_used_below_its_surface() -> None:
    for owner, names in NEEDED:
        for name in names.split():
            assert hasattr(owner, name), f"this psycopg has no {owner}.{name}: cdr/database.py needs it"
    assert psycopg.Connection.wait.__code__.co_varnames[:4] == ("self", "gen", "interval", "timeout"), (
        "Connection.wait of this psycopg takes other parameters: cdr/database.py passes a timeout"
    )


# Formats ----------------------------------------------------------------------


def encode_tsv(_fields: Sequence[str], _separator: bytes) -> Encode:
    """Text separated by tabs, in which a tab or a line end becomes a blank."""

    def encode(rows: list[memoryview], _opening: bytes) -> bytes:
        table = csv.reader(io.StringIO(b"".join(rows).decode(), newline=""))
        lines = ("\t".join(re.sub(r"[\t\r\n]", " ", cell) for cell in row) for row in table)
        return "".join(f"{line}\n" for line in lines).encode()

    return encode


def test_a_new_format_is_one_entry_and_its_encoder(
    database: Database, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tsv = Format("tsv", "text/tab-separated-values", encode_tsv, statement="copy_csv", header_rows=1)
    monkeypatch.setitem(FORMATS, "tsv", tsv)
    database.insert_call(accountcode="tsv", caller_id_name="a\tb", billsec=7)
    query = {"domain_name": "alpha.example.com", "accountcode": "tsv", "fields": "caller_id_name,billsec,bridge_uuid"}
    by_name = client.get("/api/calls", format="tsv", **query)
    by_header = client.send("GET", "/api/calls", query_string=query, headers={"Accept": "text/tab-separated-values"})
    for response in (by_name, by_header):
        assert response.headers["Content-Type"] == "text/tab-separated-values; charset=utf-8"
        assert response.text == "caller_id_name\tbillsec\tbridge_uuid\na b\t7\t\n"


def test_a_script_reads_calls_without_a_request(database: Database) -> None:
    """The engine is handed what it needs."""
    code = f"""
from cdr.clients import Client
from cdr.selection import Domains, Selection
from cdr.service import Service
from cdr.settings import Settings
from cdr.stream import FORMATS, CallStream, copy_calls

service = Service(Settings.from_environ({{"CDR_API_DSN": {database.dsn!r}, "CDR_API_SYSLOG": "off"}}))
with service.reading(0, Client(), sort=True) as connection:
    selection = Selection(Domains(everything=True))
    rows = copy_calls(connection, [selection], FORMATS["csv"], ("billsec",))
    stream = CallStream(service, connection, rows, FORMATS["csv"], ("billsec",))
print(b"".join(stream).count(b"\\n"))
service.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ((expected,),) = database.execute("SELECT count(*) FROM v_xml_cdr")
    assert int(done.stdout) == expected + 1  # the header
