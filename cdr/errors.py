"""The one error of this program, and which one a failure of the database is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import psycopg

log = logging.getLogger("cdr_api")


class ApiError(Exception):
    """An answer that is not 2xx: status, one sentence, details, more headers."""

    def __init__(
        self, status: int, message: str, data: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.data = data or {}
        self.headers = headers or {}


def envelope(message: str, data: Mapping[str, Any] | None = None) -> str:
    """The body of every answer that is not 2xx; data is a string that holds JSON."""
    return json.dumps({"message": message, "success": False, "data": json.dumps(data or {})}) + "\n"


class ValidationErrors:
    """What is wrong with a request, by parameter: all of it at once."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[str]] = {}

    def add(self, name: str, fault: str) -> None:
        sentence = f"{name[:100]} {fault}"
        self.by_name.setdefault(name[:100], []).append(sentence if sentence.endswith("?") else f"{sentence}.")

    def raise_if_any(self) -> None:
        """Raises ApiError 422 that names every fault."""
        if self.by_name:
            sentences = [sentence for faults in self.by_name.values() for sentence in faults]
            raise ApiError(422, " ".join(sentences[:5]), self.by_name)


def refuse(name: str, fault: str) -> NoReturn:
    """Raises ApiError 422 for one parameter."""
    raise ApiError(422, f"{name} {fault}.", {name: [f"{name} {fault}."]})


def unavailable(message: str, seconds: int = 5) -> ApiError:
    """503: what is missing may be there again in so many seconds."""
    return ApiError(503, message, headers={"Retry-After": str(seconds)})


NOT_SET_UP = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,  # of a schema.sql that has not been run again
    psycopg.errors.WrongObjectType,  # v_xml_cdr has become a table of another kind
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidParameterValue,  # a time zone that the server does not know
)
AWAY = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)


def unexpected(error: Exception) -> ApiError:
    """500 for a fault of this program, which the log tells in full."""
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "Something went wrong in this service; its log says what.")


def from_database(error: psycopg.Error) -> ApiError:
    """The answer to a failure of the database, which is logged."""
    # QueryCanceled first: it is an OperationalError too.
    if isinstance(error, psycopg.errors.QueryCanceled):
        return ApiError(504, "The database took too long: ask for a smaller range, or for pages.")
    log.error("database: %s", str(error).strip())
    if isinstance(error, NOT_SET_UP):
        reason = error.diag.message_primary or "not set up"
        return unavailable(f"The database is not set up for this service ({reason}): run flask check.", seconds=60)
    if isinstance(error, AWAY):
        return unavailable("The database is away, or all its connections are busy: try again soon.")
    if isinstance(error, psycopg.DataError):
        return ApiError(500, "The database holds a value that cannot be read; its log and ours say which.")
    return unexpected(error)
