"""The documents as texts, and their parts."""

from __future__ import annotations

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
DEPLOYMENT = (ROOT / "DEPLOYMENT.md").read_text("utf-8")
API = (ROOT / "docs/api.md").read_text("utf-8")
BILLING = (ROOT / "docs/billing.md").read_text("utf-8")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in sorted(ROOT.glob("**/*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.name != "RESULT.md"  # which make bench writes
}


def read_section(document: str, title: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


ERRORS = read_section(API, "Errors")


def shape(text: str) -> str:
    """An answer without what differs from one run to the next."""
    text = re.sub(r"cdr_[\w-]{43}", "TOKEN", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    return re.sub(r"\+?\d+", "N", text)
