"""Text of a request or a setting to values. Everything is refused here, with a sentence.

A parser takes a text and gives a value, or raises ValueError whose message goes
after the parameter's name.
"""

from __future__ import annotations

import difflib
import json
import re
import zoneinfo
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl
from uuid import UUID

from cdr.errors import ApiError, ValidationErrors, refuse

Parser = Callable[[str], Any]
Parsers = Mapping[str, Parser]
Pairs = Iterable[tuple[str, Any]]

MOST_PARAMETERS = 200
# A query string ends up in logs and histories.
SECRETS_IN_QUERY = {"password", "password_confirmation", "token", "access_token", "api_token", "api_key", "key"}

# Blanks around these are left out, as fusionapi did it.
TRIMMED = {"domain_name", "domain_uuid", "date", "from", "to", "month", "resolution"}
# And these are as if they were not there when they are empty. Not a domain: an answer about all of
# them must not come of a name that a client forgot to fill in.
ABSENT_IF_EMPTY = TRIMMED - {"domain_name", "domain_uuid"}
BLANKS = " \t\r\n"


# Values -----------------------------------------------------------------------


def parse_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def is_uuid(text: str) -> bool:
    # UUID() takes more: "+", "_", "0x" and digits of other scripts, which make another UUID.
    uuid = r"\{?[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}\}?"
    return bool(re.fullmatch(uuid, text, re.ASCII | re.IGNORECASE))


def parse_uuid(text: str) -> str:
    if not is_uuid(text):
        raise ValueError("must be a UUID such as 0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11")
    return str(UUID(text))


def parse_uuids(value: Any) -> list[str]:
    """UUIDs of a JSON list, each once."""
    if not isinstance(value, list) or not 1 <= len(value) <= 10_000:
        raise ValueError("must be a list of 1 to 10,000 UUIDs")
    return list(dict.fromkeys(parse_uuid(check_text(uuid)) for uuid in value))


def parse_prefix(text: str) -> str:
    """The first digits of a number. A "+" that was not escaped in a URL arrives as a blank."""
    if not re.fullmatch(r"[+ ]?[0-9]{1,32}|[+ ]", text):
        raise ValueError("must be the first digits of a number such as 49 or +4930 (%2B4930 in a URL)")
    return text.replace(" ", "+")


def parse_choices(text: str) -> str:
    """A value, or several with commas between them, none of them empty."""
    names = text.split(",")
    if len(names) > 1 and (not all(names) or len(set(names)) < len(names)):
        raise ValueError("must be one value, or different ones with commas between them")
    return text


def parse_zone(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("must be the name of a time zone such as Europe/Berlin or UTC") from None
    return text


def parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def parse_flag(text: str) -> bool:
    return one_of("true", "false")(text) == "true"


def integer_between(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(text)

    return parse


def list_of(known: Collection[str], noun: str, hint: str = "") -> Callable[[str], tuple[str, ...]]:
    """Parses names of a closed list, with commas between them, none twice."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"names unknown {noun}s: {', '.join(unknown)[:200]}{hint}")
        if len(set(names)) < len(names):
            raise ValueError(f"names a {noun} twice")
        return names

    return parse


def check_text(value: Any) -> str:
    """A value of a JSON object or a form as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if "\ufffd" in value:
        raise ValueError("must be valid UTF-8")
    return value


def read_value(name: str, value: Any) -> str:
    """The text of a parameter, without the blanks around it where they mean nothing."""
    text = parse_text(check_text(value))
    return text.strip(BLANKS) if name in TRIMMED else text


# Requests ---------------------------------------------------------------------


def read_pairs(query: bytes) -> list[tuple[str, str]]:
    """The pairs of a query string or form; ApiError 422 unless it is UTF-8."""
    try:
        return parse_qsl(query.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMETERS)
    except UnicodeDecodeError:
        raise ApiError(422, "The parameters are not valid UTF-8.") from None
    except ValueError:
        raise ApiError(422, "There are too many parameters.") from None


def read_json_object(body: bytes) -> list[tuple[str, Any]]:
    """The pairs of a JSON object; ApiError 422 for anything else."""
    try:
        # Pairs, not a dict: a key given twice must not win in silence.
        found = json.loads(body.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        raise ApiError(422, "The body is not valid JSON in UTF-8.") from None
    if not isinstance(found, tuple):
        raise ApiError(422, "The body must be a JSON object.")
    if len(found) > MOST_PARAMETERS:
        raise ApiError(422, "There are too many parameters.")
    return list(found)


def refuse_secrets(pairs: Pairs) -> None:
    """ApiError 422 if a query string holds a password or a token."""
    for name, _ in pairs:
        if name.lower() in SECRETS_IN_QUERY:
            where = "the body of a POST" if name.lower().startswith("password") else "the header Authorization: Bearer"
            refuse(name, f"must not stand in the URL, which proxies and servers log; it belongs in {where}")


def parse_pairs(pairs: Pairs, parsers: Parsers, required: Collection[str] = ()) -> dict[str, Any]:
    """The values by name, parsed; None for what was not given, or is empty where that means the same.

    Raises ApiError 422 naming every parameter that is unknown, given twice,
    missing or wrong.
    """
    errors = ValidationErrors()
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name not in parsers:
            near = difflib.get_close_matches(name, parsers, n=1, cutoff=0.75)
            errors.add(name, "is not a parameter of this route" + "".join(f". Did you mean {other}?" for other in near))
        elif name in given:
            errors.add(name, "is given twice")
        given[name] = value
    values: dict[str, Any] = dict.fromkeys(parsers)
    for name, parse in parsers.items():
        try:
            if name in given:
                value = given[name] if parse is parse_uuids else read_value(name, given[name])
                values[name] = None if value == "" and name in ABSENT_IF_EMPTY else parse(value)
            if name in required and values[name] in (None, ""):
                raise ValueError("is required")
        except ValueError as error:
            errors.add(name, str(error))
    errors.raise_if_any()
    return values
