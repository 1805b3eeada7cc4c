"""What flask check says of the memory and connections that the service may take; what docs/limits.md promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdr import check as checks
from cdr.check import find_memory_limit
from cdr.passwords import AT_ONCE
from tests.commands import check
from tests.conftest import ROOT, Database, DatabaseMaker

LIMITS = (ROOT / "docs/limits.md").read_text("utf-8")


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(index=True)


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("[Service]\nMemoryMax=1G\n", "", 1024),
        ("[Service]\nMemoryMax=300M\n", "", 300),
        ("[Service]\nMemoryMax=1073741824\n", "", 1024),
        ("[Service]\nMemoryMax=1G\n", "[Service]\nMemoryMax=2G\n", 2048),
        ("[Service]\nMemoryMax=1G\n", "[Service]\nMemoryMax=infinity\n", None),
        ("[Service]\n# MemoryMax=1G\n", "", None),
        ("", "", None),
    ],
)
def test_the_limit_of_the_unit_is_read(tmp_path: Path, text: str, more: str, expected: float | None) -> None:
    unit = tmp_path / "cdr-api.service"
    unit.write_text(text, "utf-8")
    (tmp_path / "cdr-api.service.d").mkdir()
    (tmp_path / "cdr-api.service.d/override.conf").write_text(more, "utf-8")
    assert find_memory_limit(unit) == expected
    assert find_memory_limit(tmp_path / "no.service") is None


@pytest.mark.parametrize(
    ("settings", "mark"),
    [({"CDR_API_WORKERS": "2", "CDR_API_THREADS": "8"}, "✓"), ({"CDR_API_WORKERS": "4", "CDR_API_THREADS": "8"}, "✗")],
)
def test_check_compares_the_sum_with_the_shipped_unit(
    database: Database, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], mark: str
) -> None:
    monkeypatch.setattr(checks, "UNIT_FILES", [ROOT / "deploy/cdr-api.service"] * 2)
    status, lines = check(database.app(**settings))
    assert lines["memory"].startswith(mark)
    assert (status == 1) == (mark == "✗")
    workers, threads = map(int, settings.values())
    assert f"take {workers * (80 + 2 * 32 + threads * 16)} MB" in lines["memory"]


def test_check_says_nothing_of_memory_where_there_is_no_unit(database: Database) -> None:
    assert "memory" not in check(database.app())[1]


def test_check_compares_the_connections_with_those_of_the_role(database: Database) -> None:
    app = database.app(CDR_API_WORKERS="2", CDR_API_THREADS="8")
    assert check(app)[1]["connections"].startswith("✓")
    database.execute("ALTER ROLE cdr_api CONNECTION LIMIT 15")
    try:
        line = check(app)[1]["connections"]
    finally:
        database.execute("ALTER ROLE cdr_api CONNECTION LIMIT -1")
    assert line.startswith("! connections        the service wants up to 16; the role may have 15")


def test_the_document_reckons_as_check_does() -> None:
    sum_ = f"workers × ({checks.WORKER_MB} MB + {AT_ONCE} × {checks.PASSWORD_MB} MB + threads × {checks.ANSWER_MB} MB)"
    assert sum_ in LIMITS


def test_every_bound_has_a_test() -> None:
    rows = [row for row in LIMITS.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8") if name else (ROOT / "tests" / file)
