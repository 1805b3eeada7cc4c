"""When a peer's value means the same as the service's.

Each peer shows values as its libraries do by themselves. Nothing else is made
alike than:

- a moment in any notation (ISO 8601, PostgreSQL's, HTTP's) is its epoch seconds;
  one of 1970, which FusionPBX stores for a call that nobody answered, is null,
  as the service repairs it;
- what is a number in the database is that number, as text or not, and however
  many zeros stand behind its decimal point.

All other values must be equal, their types too.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any

from cdr.selection import FIELDS, INTEGERS, NUMBERS

STAMPS = {name for name in FIELDS if name.endswith("_stamp")}
NUMERIC = INTEGERS | NUMBERS | {"hangup_cause_q850"} | {name for name in FIELDS if name.endswith("_epoch")}
DAY = 86_400  # seconds


def plain(name: str, value: Any) -> Any:
    """A field's value in the one form that is compared."""
    if value is None:
        return None
    if name in STAMPS:
        seconds = read_moment(value).timestamp()
        return seconds if seconds > DAY else None
    if name in NUMERIC:
        return Decimal(str(value))
    return type(value), value


def read_moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return parsedate_to_datetime(text)
