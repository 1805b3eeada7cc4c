"""Accounts: rules for passwords, bearer tokens, and how often a login or a registration may be tried."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from cdr.database import Connection, codec_of, prepare, run, select_prepared
from cdr.errors import ApiError, ValidationErrors, refuse
from cdr.selection import Domains
from cdr.service import Service
from cdr.statements import STATEMENTS, can_hold, number_placeholders, read_text

log = logging.getLogger("cdr_api")

UNAUTHENTICATED = {"WWW-Authenticate": "Bearer"}


# Tokens -----------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Who asks: the account of the presented token.

    With it the domains that bear the name that the request names, or that the
    domain of the uuid has: each with uuid, name and granted. In one round trip, or
    in two where the side tables are apart; then with its grants, too.
    """

    account_id: int
    token_id: int
    all_domains: bool
    chosen_uuids: Sequence[str] | None = None  # of the domains that the token was made for; None: all of the account
    named: Sequence[Mapping[str, Any]] = ()
    granted: Sequence[str] | None = None  # the uuids of its domains, where the side tables are apart
    newest_grant: int | None = None  # of these

    @property
    def reads_everything(self) -> bool:
        """Whether it may read every call, those of no domain too."""
        return self.all_domains and self.chosen_uuids is None

    def may_read(self, domain: Mapping[str, Any]) -> bool:
        """Whether it may read a domain of named."""
        chosen = self.chosen_uuids is None or domain["uuid"] in self.chosen_uuids
        return chosen and (self.all_domains or domain["granted"])

    def domain_parameters(self) -> dict[str, Any]:
        """Those of the statements that list its domains."""
        chosen = None if self.chosen_uuids is None else list(self.chosen_uuids)
        given = {"granted": self.granted, "newest_grant": self.newest_grant}
        return {"account_id": self.account_id, "all_domains": self.all_domains, "chosen_uuids": chosen, **given}


def digest_token(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def authenticate(service: Service, token: str, naming: Mapping[str, str], address: str | None) -> Account | None:
    """The account of a live token that may be used from the client's address, or None.

    naming is the domain_name or domain_uuid of the request, or empty.
    """
    found = find_token(service, digest_token(token), {} if service.is_apart else naming)
    if not found or not is_within(address, found.pop("networks")):
        return None
    if found.pop("stale"):
        touch_token(service, found["token_id"])
    account = Account(**found)
    return find_named(service, account, naming) if service.is_apart and naming else account


def is_within(address: str | None, networks: Sequence[str] | None) -> bool:
    """Whether a client's address, if it is known, lies in one of some networks (None: anywhere)."""
    if networks is None:
        return True
    if address is None:
        return False
    client = ipaddress.ip_address(address)
    mapped = getattr(client, "ipv4_mapped", None)
    return any((mapped or client) in ipaddress.ip_network(network) for network in networks)


def find_token(service: Service, digest: bytes, naming: Mapping[str, str]) -> dict[str, Any] | None:
    parameters: dict[str, Any] = {"digest": digest, **naming}
    query = compose_authenticate(next(iter(naming), None), apart=service.is_apart)
    with service.accounts.connection() as connection, connection.reading_committed():
        if connection.prepared is None:
            row = connection.execute(query, parameters).fetchone()
            return json.loads(row["found"]) if row else None
        name = prepare(connection, number_placeholders(query, parameters))
        rows = select_prepared(
            connection, name, [b"\\x" + digest.hex().encode(), *(value.encode() for value in naming.values())]
        )
        return json.loads(rows[0]) if rows else None


@functools.cache
def compose_authenticate(naming: str | None, *, apart: bool) -> str:
    """The statement that find_token runs, for a domain by its domain_name or domain_uuid, or for none."""
    query: sql.Composable = STATEMENTS["authenticate"]
    account_id = sql.SQL("token.account_id")
    if apart:
        grants = STATEMENTS["find_grants"].format(account_id=account_id)
        query = STATEMENTS["authenticate_apart"].format(authenticate=query, find_grants=grants)
    elif naming:
        named = compose_named(naming, STATEMENTS["grants_beside"].format(account_id=account_id))
        query = STATEMENTS["authenticate_for_domain"].format(authenticate=query, find_named_domains=named)
    return STATEMENTS["as_json"].format(query=query).as_string()


def compose_named(naming: str, grants: sql.Composable) -> sql.Composed:
    name = STATEMENTS["name_of_domain"] if naming == "domain_uuid" else sql.Placeholder("domain_name")
    return STATEMENTS["find_named_domains"].format(grants=grants, name=name)


def compose_grants(*, apart: bool) -> sql.Composable:
    """The grants of the account of Account.domain_parameters, as a table."""
    if apart:
        return STATEMENTS["grants_given"]
    return STATEMENTS["grants_beside"].format(account_id=sql.Placeholder("account_id"))


def compose_listing(statement: str, *, apart: bool) -> sql.Composed:
    """A statement that lists the domains of an account, by its grants."""
    grants = compose_grants(apart=apart)
    return STATEMENTS[statement].format(readable=STATEMENTS["readable_domains"].format(grants=grants), grants=grants)


def find_named(service: Service, account: Account, naming: Mapping[str, str]) -> Account:
    """The account with the domains of the request as they are now."""
    query = compose_named(next(iter(naming)), compose_grants(apart=service.is_apart))
    with service.domains.connection() as connection, connection.reading_committed():
        row = connection.execute(query, {**account.domain_parameters(), **naming}).fetchone()
    return replace(account, named=row["named"] if row else ())


def list_domains(connection: Connection, *, all_domains: bool, granted: Sequence[str] = ()) -> Domains:
    """All domains of FusionPBX's database, or those of some uuids. For commands, which need not be quick."""
    query = compose_listing("find_domains", apart=True)
    account = Account(0, 0, all_domains, granted=list(granted))
    row = connection.execute(query, account.domain_parameters()).fetchall()[0]
    return read_domains(row, codec_of(connection))


def choose_domains(
    connection: Connection, fusionpbx: Connection, account: Mapping[str, Any], names: Sequence[str]
) -> list[str]:
    """The uuids of an account's domains, each by its name or uuid; ValueError for one that it may not read.

    connection: to the side tables. fusionpbx: to v_domains.
    """
    query = STATEMENTS["find_grants"].format(account_id=sql.Placeholder("account_id"))
    (grants,) = connection.execute(query, {"account_id": account["account_id"]}).fetchall()
    domains = list_domains(fusionpbx, all_domains=account["all_domains"], granted=grants["granted"])
    chosen: list[str] = []
    for name in names:
        uuids = [uuid for uuid, other in zip(domains.uuids, domains.names, strict=True) if name in (uuid, other)]
        if not uuids:
            raise ValueError(f"this account may not read {name}")
        chosen += uuids
    return chosen


def find_domains(service: Service, account: Account) -> Domains:
    """Every domain that the account may read."""
    query = compose_listing("find_domains", apart=service.is_apart)
    with service.domains.connection() as connection, connection.reading_committed():
        row = connection.execute(query, account.domain_parameters()).fetchall()[0]
    found = read_domains(row, service.domains.codec)
    return replace(
        found,
        everything=account.reads_everything,
        newest_grant=row["newest_grant"],
        absent=row["absent"] or [],
        chosen_uuids=account.chosen_uuids,
    )


def read_domains(row: Mapping[str, Any], codec: str | None) -> Domains:
    """A row of find_domains, from a database with a codec."""
    names, lone_names = ([read_text(name, codec) for name in row[column] or ()] for column in ("names", "lone_names"))
    return Domains(row["uuids"] or [], names, lone_names, codec=codec)


def select_domains(service: Service, account: Account, domain_uuid: str | None) -> Domains:
    """The domains that the request names; ApiError 403, or 404 for accounts that may read all.

    A name is readable when every domain that bears it is.
    """
    asked = [found for found in account.named if domain_uuid in (None, found["uuid"])]
    if account.reads_everything and not asked:
        raise ApiError(404, "There is no such domain.")
    if not (asked and all(map(account.may_read, asked))):
        raise ApiError(403, "This account may not read this domain.")
    codec = service.domains.codec
    names = [read_text(found["name"], codec) for found in asked]
    lone_names = names if len(account.named) == 1 else []
    return Domains([found["uuid"] for found in asked], names, lone_names, named=True, codec=codec)


def touch_token(service: Service, token_id: int) -> None:
    """Notes the token's use. Reading calls goes on where this cannot be written."""
    try:
        service.accounts.rows("touch_token", token_id=token_id)
    except psycopg.Error as error:
        log.warning("the use of token %s was not noted: %s", token_id, str(error).strip())


def new_token(
    connection: Connection,
    account_id: int,
    days: int,
    domain_uuids: Sequence[str] | None = None,
    networks: Sequence[str] | None = None,
) -> str | None:
    """Makes a token, good for so many days (0: for ever), some of the account's domains and some networks.

    None if the account is disabled.
    """
    token = "cdr_" + secrets.token_urlsafe(32)
    limits = {"domain_uuids": domain_uuids, "networks": networks}
    made = run(connection, "insert_token", account_id=account_id, digest=digest_token(token), days=days, **limits)
    # Behind it, which locks the account: whoever disables one locks it before its tokens.
    run(connection, "delete_expired_tokens", account_id=account_id)
    return token if made else None


# Attempts ---------------------------------------------------------------------


def name_network(address: str) -> str:
    """What stands for one client: an IPv4 address, or the /64 that an IPv6 address lies in."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6 and found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64 if found.version == 6 else 32), strict=False))


def name_client(purpose: str, address: str | None) -> list[str]:
    """By what attempts from an address are counted for a purpose: nothing if it is not known."""
    return [f"{purpose} {name_network(address)}"] if address else []


@dataclass(frozen=True)
class Attempt:
    """A login or a registration: counted under some names, such as its account and its address, before it is made.

    Before, so that of many at the same time no more get through. Digests, since
    what stands in the field for an e-mail address may be a password. Every
    transaction locks their rows in the order of their keys: else two logins at
    once could wait for each other.
    """

    next_at: Mapping[bytes, int]  # when each of them may try again, by this attempt

    @classmethod
    def count(cls, service: Service, names: Iterable[str], too_many: str) -> Attempt:
        """Counts an attempt; ApiError 429, which begins with a text, if one of the names has to wait."""
        keys = sorted(map(digest_token, names))
        with service.accounts.connection() as connection:
            run(connection, "delete_old_attempts")  # by itself: else it would lock rows out of their order
            with connection.transaction():
                counted = {row["key"]: row["next_at"] for row in run(connection, "count_attempt", keys=keys)}
                if len(counted) < len(keys):
                    seconds = run(connection, "find_wait", keys=keys)[0]["seconds"]
                    headers = {"Retry-After": str(seconds)}
                    raise ApiError(429, f"{too_many}: wait {seconds} seconds.", headers=headers)
        return cls(counted)

    @contextmanager
    def unless_busy(self, service: Service) -> Iterator[None]:
        """Takes the attempt out of the count if its password could not be looked at."""
        try:
            yield
        except ApiError:
            with service.accounts.connection() as connection:
                for key, next_at in self.next_at.items():
                    run(connection, "undo_attempt", key=key, next_at=next_at)
            raise

    def forgive(self, connection: Connection, account: str) -> None:
        """Takes a right login out of the count: all of the account's, this one of the address's.

        Else whoever has one account could guess at others for ever.
        """
        for key, next_at in sorted(self.next_at.items()):
            if key == digest_token(account):
                run(connection, "delete_attempts", key=key)
            else:
                run(connection, "undo_attempt", key=key, next_at=next_at)


# Accounts ---------------------------------------------------------------------

# What an unknown address is checked against: of a password that nobody knows, at the same cost as others.
ABSENT_HASH = (
    "scrypt:32768:8:1$zm4q2muSoARoYrL9$"
    "649443107f8f983995c1bcb79319afef05889bab7976471a89027bbd454f594b"
    "f05aacd60d049407b037e4467cf5e00f0e539d49c9410ca3e6dceb1985a0193a"
)


def email_key(email: str) -> str:
    """What addresses are compared by: no regard to case and outer blanks."""
    return email.strip().lower()


# What mail systems take everywhere, and ASCII only: beyond it stand letters that look like
# these, or like nothing, by which an account could pass for another.
ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
EMAIL = re.compile(rf"{ATOM}(?:\.{ATOM})*@{LABEL}(?:\.{LABEL})*")


def parse_email(text: str) -> str:
    """The address of a new account; those of older accounts may be others."""
    email = text.strip()
    if len(email) > 254 or email.find("@") > 64 or not EMAIL.fullmatch(email):
        raise ValueError("must be an e-mail address of at most 254 ASCII characters")
    return email


def parse_name(text: str) -> str:
    name = text.strip()
    if not 1 <= len(name) <= 255 or not name.isprintable():
        raise ValueError("must be 1 to 255 printable characters")
    return name


def check_password(password: str, email: str) -> None:
    """Raises ValueError unless the password keeps the rule of docs/api.md."""
    named = (str.islower, str.isupper, str.isdigit)
    kinds = (*named, lambda c: not any(kind(c) for kind in named))
    variety = sum(any(kind(c) for c in password) for kind in kinds)
    if len(password.encode()) > 1024:
        raise ValueError("must be at most 1024 bytes long")
    if not (len(password) >= 20 or (len(password) >= 12 and variety >= 3)):
        raise ValueError(
            "must have at least 12 characters with three of lower case, upper case, digits and others, "
            "or at least 20 of any kind"
        )
    local = email.partition("@")[0].lower()
    if len(local) >= 4 and local in password.lower():
        raise ValueError("must not contain the name part of the e-mail address")


def check_new_account(service: Service, values: Mapping[str, str]) -> None:
    """ApiError 422 unless the values of a registration can be stored and its password keeps the rule, typed twice."""
    errors = ValidationErrors()
    if not can_hold(service.accounts.codec, values["name"]):
        errors.add("name", "holds characters that the database cannot store")
    try:
        check_password(values["password"], values["email"])
    except ValueError as error:
        errors.add("password", str(error))
    if values["password"] != values["password_confirmation"]:
        errors.add("password_confirmation", "is not the same as password")
    errors.raise_if_any()


def add_account(
    connection: Connection, name: str, email: str, password_hash: str, *, all_domains: bool
) -> dict[str, Any] | None:
    """Makes an account; None if the address is taken."""
    made = run(
        connection,
        "insert_account",
        name=name,
        email=email,
        email_key=email_key(email),
        password_hash=password_hash,
        all_domains=all_domains,
    )
    return made[0] if made else None


def register(service: Service, values: Mapping[str, str], address: str | None) -> tuple[dict[str, Any], str]:
    """A new account with a token, from checked values, for a client's address if that is known.

    ApiError 422 if the e-mail address is taken, 429 after too many, 503 if busy.
    """
    settings = service.settings
    all_domains = settings.register_domains == ("*",)
    # Never forgiven, right or wrong: one that makes accounts should be slow, too.
    attempt = Attempt.count(service, name_client("registration", address), "Too many registrations from this address")
    with attempt.unless_busy(service):
        password_hash = service.passwords.hash(values["password"])
    names = [name for name in settings.register_domains if can_hold(service.domains.codec, name)]
    granted = [row["domain_uuid"] for row in service.domains.rows("find_uuids", domain_names=names)]
    with service.accounts.connection() as connection, connection.transaction():
        account = add_account(connection, values["name"], values["email"], password_hash, all_domains=all_domains)
        if not account:
            refuse("email", "has already been taken")
        run(connection, "upsert_grants", account_id=account["account_id"], domain_uuids=granted)
        token = new_token(connection, account["account_id"], settings.token_days)
    return account, token or ""


def name_account(key: str) -> str:
    """By what the logins of an e-mail address are counted."""
    return f"account {key}"


def count_login(service: Service, key: str, address: str | None) -> Attempt:
    """Counts a login, as failed until it is forgiven; ApiError 429 if the account or the address has to wait."""
    try:
        names = [name_account(key), *name_client("address", address)]
        return Attempt.count(service, names, "Too many logins failed")
    except ApiError:
        service.report_failure(key, address)
        raise


def log_in(service: Service, email: str, password: str, address: str | None) -> tuple[dict[str, Any], str]:
    """The account of a right login with a new token; ApiError 401 for a wrong one, 429 after too many, 503 if busy."""
    key = email_key(email)
    attempt = count_login(service, key, address)
    found = service.accounts.rows("find_account", email_key=key) if can_hold(service.accounts.codec, key) else []
    account: dict[str, Any] = found[0] if found else {"password_hash": ABSENT_HASH, "disabled": False}
    with attempt.unless_busy(service):
        right = service.passwords.is_right(account["password_hash"], password)
    token = None
    if found and right and not account["disabled"]:
        with service.accounts.connection() as connection, connection.transaction():
            attempt.forgive(connection, name_account(key))
            token = new_token(connection, account["account_id"], service.settings.token_days)
    if not token:
        service.report_failure(key, address)
        raise ApiError(401, "The e-mail address or the password is wrong.", headers=UNAUTHENTICATED)
    return account, token


def show_login(account: Mapping[str, Any], token: str) -> dict[str, Any]:
    """The body of an answer to register or login."""
    user = {
        "id": account["account_id"],
        "name": account["name"],
        "email": account["email"],
        "email_verified_at": None,
        "created_at": account["created_at"],
        "updated_at": account["updated_at"],
    }
    return {"user": user, "token": token, "success": True}
