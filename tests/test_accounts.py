"""register, login, logout: who gets a token, and when it dies."""

from __future__ import annotations

import json
import re
import threading
from datetime import datetime, timedelta
from typing import Any

import pytest
from werkzeug.security import check_password_hash

from tests.conftest import PASSWORD, ROOT, Client, Database, DatabaseMaker, problem


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=30)


@pytest.fixture(scope="module")
def public(database: Database) -> Client:
    """Without a token."""
    return database.client()


@pytest.fixture(autouse=True)
def _patience(database: Database) -> None:
    """All of these come from one address."""
    database.execute("TRUNCATE cdr_api.attempts")


def person(email: str, **values: Any) -> dict[str, Any]:
    return {"name": "Ann", "email": email, "password": PASSWORD, "password_confirmation": PASSWORD} | values


def test_register_then_use_then_logout(database: Database) -> None:
    app = database.app(CDR_API_REGISTER_DOMAINS="beta.example.com, gamma.example.com, no.such.domain")
    response = database.client(app=app).post("/api/register", json=person("  Ann@Example.COM "))
    assert response.status_code == 201
    body = response.get_json()
    assert list(body) == ["user", "token", "success"]
    assert list(body["user"]) == ["id", "name", "email", "email_verified_at", "created_at", "updated_at"]
    assert body["success"] is True
    assert body["user"]["name"] == "Ann"
    assert body["user"]["email"] == "Ann@Example.COM"
    assert body["user"]["email_verified_at"] is None
    assert isinstance(body["user"]["id"], int)
    for stamp in (body["user"]["created_at"], body["user"]["updated_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
    assert re.fullmatch(r"cdr_[A-Za-z0-9_-]{43}", body["token"])

    mine = database.client(body["token"], app)
    assert [row["domain_name"] for row in mine.get("/api/domains").get_json()] == [
        "beta.example.com",
        "gamma.example.com",
    ]
    response = mine.post("/api/logout")
    assert response.status_code == 200
    assert response.get_json()["success"] is True
    assert isinstance(response.get_json()["message"], str)
    assert mine.get("/api/domains").status_code == 401

    response = database.client(app=app).post("/api/login", data={"email": "ann@example.com ", "password": PASSWORD})
    assert response.status_code == 200
    assert response.get_json()["user"] == body["user"]
    assert response.get_json()["token"] != body["token"]
    assert database.client(response.get_json()["token"], app).get("/api/domains").status_code == 200


def test_registering_grants_nothing_by_default(database: Database, public: Client) -> None:
    token = public.post("/api/register", json=person("nobody@example.com")).get_json()["token"]
    mine = database.client(token, public.app)
    assert mine.get("/api/domains").get_json() == []
    assert mine.get("/api/calls", domain_name="alpha.example.com").status_code == 403


def test_registering_may_grant_everything_or_be_closed(database: Database) -> None:
    everything = database.client(app=database.app(CDR_API_REGISTER_DOMAINS="*"))
    token = everything.post("/api/register", data=person("all@example.com")).get_json()["token"]
    assert len(database.client(token, everything.app).get("/api/domains").get_json()) == 3
    closed = database.client(app=database.app(CDR_API_REGISTRATION="closed"))
    response = closed.post("/api/register", data=person("late@example.com"))
    assert response.status_code == 403
    problem(response)
    assert database.execute("SELECT 1 FROM cdr_api.accounts WHERE email_key = 'late@example.com'") == []


def test_a_form_with_files_or_in_parts(public: Client) -> None:
    form = person("parts@example.com")
    assert public.post("/api/register", data=form, content_type="multipart/form-data").status_code == 201


@pytest.mark.parametrize(
    ("password", "email", "accepted"),
    [
        pytest.param("Short1Short", "a@b.c", False, id="11 characters"),
        pytest.param("LongEnough12", "a@b.c", True, id="12 with three kinds"),
        pytest.param("longenough12", "a@b.c", False, id="12 with two kinds"),
        pytest.param("longenough1-", "a@b.c", True, id="others count as a kind"),
        pytest.param("密码密码密码abc123", "a@b.c", True, id="letters without case are others"),
        pytest.param("пароль-Пароль", "a@b.c", True, id="other scripts"),
        pytest.param("a" * 19, "a@b.c", False, id="19 of one kind"),
        pytest.param("a" * 20, "a@b.c", True, id="20 of one kind"),
        pytest.param("é" * 512, "a@b.c", True, id="1024 bytes"),
        pytest.param("é" * 513, "a@b.c", False, id="1026 bytes"),
        pytest.param("My-Anna-Pass1", "Anna@b.c", False, id="holds the name part"),
        pytest.param("my-ANNA-pass1", "anna@b.c", False, id="holds the name part in capitals"),
        pytest.param("My-Ann-Pass12", "ann@b.c", True, id="a name part of 3 does not count"),
    ],
)
def test_password_rule(public: Client, database: Database, password: str, email: str, accepted: bool) -> None:  # noqa: FBT001
    email = email.replace("@", f"@{next(database.numbers)}.")
    response = public.post("/api/register", json=person(email, password=password, password_confirmation=password))
    assert response.status_code == (201 if accepted else 422), response.text
    if not accepted:
        assert list(problem(response)["data"]) == ["password"]
        assert database.execute("SELECT 1 FROM cdr_api.accounts WHERE email = %s", [email]) == []


@pytest.mark.parametrize(
    ("change", "faulty"),
    [
        pytest.param({"name": ""}, ["name"], id="empty name"),
        pytest.param({"name": "a\x07b"}, ["name"], id="bell in the name"),
        pytest.param({"name": "x" * 256}, ["name"], id="long name"),
        pytest.param({"email": "nobody"}, ["email"], id="no at"),
        pytest.param({"email": "a b@c.d"}, ["email"], id="blank in the address"),
        pytest.param({"email": "a@" + "b" * 10_000}, ["email"], id="address of 10,000 characters"),
        pytest.param({"email": "a\x00@b.c"}, ["email"], id="NUL"),
        pytest.param({"password_confirmation": "other"}, ["password_confirmation"], id="another confirmation"),
        pytest.param(
            {"password": "x", "password_confirmation": "y"}, ["password", "password_confirmation"], id="two faults"
        ),
        pytest.param(
            {"name": 5, "email": ["a@b.c"], "password": None}, ["name", "email", "password"], id="not strings"
        ),
        pytest.param({"admin": "true"}, ["admin"], id="unknown"),
        pytest.param({"name": {"first": "Ann"}}, ["name"], id="an object"),
        pytest.param({"email": "\ud800@b.c"}, ["email"], id="half a surrogate"),
    ],
)
def test_bad_registrations_name_every_fault_and_store_nothing(
    database: Database, public: Client, change: dict[str, Any], faulty: list[str]
) -> None:
    before = database.execute("SELECT count(*) FROM cdr_api.accounts")
    response = public.post("/api/register", json=person("fault@example.com") | change)
    assert response.status_code == 422
    assert sorted(problem(response)["data"]) == sorted(faulty)
    assert database.execute("SELECT count(*) FROM cdr_api.accounts") == before


ADDRESSES = {
    "admin@example.com": True,
    "  Ann.O'Neill+cdr@mail-1.example.com\t": True,
    "root@localhost": True,
    "a@xn--mller-kva.example": True,
    "x" * 64 + "@example.com": True,
    "a@" + "b" * 63 + ".example": True,
    "\u0430dmin@example.com": False,  # Cyrillic
    "admin@ex\u0430mple.com": False,
    "\uff41dmin@example.com": False,  # full width
    "admin\u3164@example.com": False,  # looks like nothing
    "jose\u0301@example.com": False,
    "jos\u00e9@example.com": False,
    "\u212aim@example.com": False,  # the Kelvin sign, in lower case a k
    "x" * 65 + "@example.com": False,
    "a@" + "b" * 64 + ".example": False,
    "a@" + ".".join(["b" * 60] * 5): False,
    ".a@example.com": False,
    "a..b@example.com": False,
    "a@-example.com": False,
    "a@example..com": False,
    "a@example.com.": False,
    "a@[192.0.2.1]": False,
    '"a b"@example.com': False,
    "a<b>@example.com": False,
    "a\\u0430@example.com": False,
}


@pytest.mark.parametrize("email", ADDRESSES, ids=ascii)
def test_an_address_is_one_that_mail_systems_take_and_looks_like_no_other(public: Client, email: str) -> None:
    response = public.post("/api/register", json=person(email))
    assert response.status_code == (201 if ADDRESSES[email] else 422), response.text
    if not ADDRESSES[email]:
        assert list(problem(response)["data"]) == ["email"]
    description = json.loads((ROOT / "openapi.json").read_text("utf-8"))["components"]["schemas"]["Registration"]
    pattern = re.compile(description["properties"]["email"]["pattern"])
    limits = len(email) <= 254 and email.find("@") <= 64  # of which the pattern knows nothing
    assert (limits and bool(pattern.search(email.replace("\t", " ")))) == ADDRESSES[email]


@pytest.mark.parametrize(
    "email", ["\u0430dmin@example.com", "Jos\u00e9@example.com", "a b@c", "a\\b@example.com"], ids=ascii
)
def test_an_account_from_before_logs_in_whatever_its_address(database: Database, public: Client, email: str) -> None:
    database.account(email=email)
    for written in (email, f" {email.upper()} "):
        response = public.post("/api/login", json={"email": written, "password": PASSWORD})
        assert response.status_code == 200, response.text
        assert response.get_json()["user"]["email"] == email


def test_missing_parameters_are_all_named(public: Client) -> None:
    response = public.post("/api/register")
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["name", "email", "password", "password_confirmation"]
    response = public.post("/api/login", json={})
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["email", "password"]


def test_a_taken_address_is_refused_whatever_its_case(public: Client) -> None:
    assert public.post("/api/register", json=person("Taken@example.com")).status_code == 201
    response = public.post("/api/register", json=person(" tAKEN@EXAMPLE.com"))
    assert response.status_code == 422
    assert problem(response)["data"] == {"email": ["email has already been taken."]}


def test_of_two_registrations_at_once_one_wins(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdr.passwords.WAIT_SECONDS", 60)
    app = database.app(CDR_API_THREADS="16")  # so that all six may wait for their password
    barrier = threading.Barrier(6)
    codes: list[int] = []

    def register() -> None:
        barrier.wait()
        codes.append(Client(app).post("/api/register", json=person("race@example.com")).status_code)

    threads = [threading.Thread(target=register) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [201, 422, 422, 422, 422, 422]
    assert len(database.execute("SELECT 1 FROM cdr_api.accounts WHERE email_key = 'race@example.com'")) == 1


def test_wrong_and_unknown_logins_look_the_same(
    database: Database, public: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.account(email="known@example.com")
    work: list[str] = []

    def check(pwhash: str, password: str) -> bool:
        work.append(pwhash)
        return check_password_hash(pwhash, password)

    monkeypatch.setattr("cdr.passwords.check_password_hash", check)
    answers = [
        public.post("/api/login", json={"email": email, "password": "Wrong-password-1"}, headers={"X-Request-ID": "1"})
        for email in ("known@example.com", "unknown@example.com")
    ]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].data == answers[1].data
    assert answers[0].headers == answers[1].headers
    assert answers[0].headers["WWW-Authenticate"] == "Bearer"
    # The same work: one scrypt of the same cost each.
    assert [pwhash.split("$")[0] for pwhash in work] == ["scrypt:32768:8:1"] * 2


def test_a_long_password_is_compared_whole(database: Database, public: Client) -> None:
    password = "Aa1-" * 256  # 1024 bytes
    values = person("long@example.com", password=password, password_confirmation=password)
    assert public.post("/api/register", json=values).status_code == 201
    login = {"email": "long@example.com", "password": password}
    assert public.post("/api/login", json=login).status_code == 200
    assert public.post("/api/login", json=login | {"password": password + "x"}).status_code == 401


def test_logout_ends_one_token_or_all(database: Database) -> None:
    app = database.app()
    database.account(email="many@example.com")
    login = {"email": "many@example.com", "password": PASSWORD}
    tokens = [Client(app).post("/api/login", json=login).get_json()["token"] for _ in range(4)]
    clients = [Client(app, token) for token in tokens]
    assert clients[0].post("/api/logout").status_code == 200
    assert [c.get("/api/domains").status_code for c in clients] == [401, 200, 200, 200]
    assert clients[1].post("/api/logout", data={"all": "yes"}).status_code == 422
    assert clients[1].post("/api/logout", json={"all": False}).status_code == 200
    assert [c.get("/api/domains").status_code for c in clients] == [401, 401, 200, 200]
    assert clients[2].post("/api/logout?all=true").status_code == 200
    assert [c.get("/api/domains").status_code for c in clients] == [401] * 4


def test_tokens_are_stored_as_digests_and_their_use_is_noted(database: Database) -> None:
    token = database.account("alpha.example.com", email="stored@example.com", days=0)
    dump = str(database.execute("SELECT * FROM cdr_api.tokens")) + str(
        database.execute("SELECT * FROM cdr_api.accounts")
    )
    assert token not in dump
    assert token.removeprefix("cdr_") not in dump
    find = (
        "SELECT last_used_at, expires_at FROM cdr_api.tokens JOIN cdr_api.accounts USING (account_id) WHERE email = %s"
    )
    assert database.execute(find, ["stored@example.com"]) == [(None, None)]
    client = database.client(token)
    client.get("/api/domains")
    first = database.execute(find, ["stored@example.com"])[0][0]
    assert isinstance(first, datetime)
    client.get("/api/domains")
    assert database.execute(find, ["stored@example.com"])[0][0] == first  # not written again within the hour
    database.execute("UPDATE cdr_api.tokens SET last_used_at = now() - interval '61 minutes'")
    client.get("/api/domains")
    assert database.execute(find, ["stored@example.com"])[0][0] > first


def test_tokens_expire_after_the_days_of_the_setting(database: Database) -> None:
    app = database.app(CDR_API_TOKEN_DAYS="7")
    token = Client(app).post("/api/register", json=person("week@example.com")).get_json()["token"]
    table = "cdr_api.tokens JOIN cdr_api.accounts USING (account_id)"
    find = f"SELECT expires_at - tokens.created_at FROM {table} WHERE email = %s"
    assert database.execute(find, ["week@example.com"]) == [(timedelta(days=7),)]
    database.execute(
        "UPDATE cdr_api.tokens SET expires_at = now() - interval '1 s' WHERE expires_at > now() + interval '6 days'"
    )
    assert Client(app, token).get("/api/domains").status_code == 401
    Client(app).post("/api/login", json={"email": "week@example.com", "password": PASSWORD})
    assert len(database.execute(find, ["week@example.com"])) == 1  # the dead one was swept away
