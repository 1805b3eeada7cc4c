"""Two nodes that replicate FOR ALL TABLES to each other, as FusionPBX clusters do, and one of them fails."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

import demo
from cdr_api import create_app
from tests.clients import Answer, fetch, scrape
from tests.commands import check, flask
from tests.conftest import PASSWORD, DatabaseMaker, Gunicorn, serve, wait_for
from tests.servers import Node, own_node, run_schema

pytestmark = pytest.mark.direct("runs servers of its own")
ALPHA = demo.DOMAINS[0]
EMAIL = "billing@example.com"
COUNT = "SELECT count(*) FROM v_xml_cdr"


class SideNode(Node):
    """A node by the database of its side tables."""

    name = "cdr_api"


@dataclass
class Half:
    """A node of the cluster, its database of side tables, and its service."""

    node: Node
    aside: Node
    token: str = ""
    found: list[str] = field(default_factory=list)
    place: str = "from=2026-01-01"
    through: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        return {"CDR_API_DSN": self.node.dsn("cdr_api"), "CDR_API_ACCOUNTS_DSN": self.aside.dsn("cdr_api")}

    def run(self, *arguments: str, stdin: str = "") -> Any:
        app = create_app({**self.settings, "CDR_API_SYSLOG": "off"})
        done = flask(app, *arguments, stdin=stdin)
        app.extensions["cdr_api"].close()
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    def add_account(self, email: str) -> str:
        named = ("user", "add", email, "--name", "B", "--domain", ALPHA, "--password-stdin")
        self.run(*named, stdin=f"{PASSWORD}\n")
        return str(self.run("token", "create", email))

    def store(self, calls: int) -> set[str]:
        uuids = {str(uuid4()) for _ in range(calls)}
        with self.node.connect() as connection:
            for uuid in uuids:
                connection.execute(
                    "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp)"
                    " SELECT %s, domain_uuid, domain_name, now() FROM v_domains WHERE domain_name = %s",
                    [uuid, ALPHA],
                )
        return uuids

    def serve(self) -> AbstractContextManager[Gunicorn]:
        return serve(self.settings["CDR_API_DSN"], CDR_API_METRICS="on", **self.settings)

    def ask(self, gunicorn: Gunicorn, path: str) -> Answer:
        return fetch(f"{gunicorn.url}/api/{path}", self.token)

    def poll(self, gunicorn: Gunicorn) -> Answer:
        answer = self.ask(gunicorn, f"call_feed?fields=xml_cdr_uuid&{self.place}")
        if answer.status_code == 200:
            self.place = f"cursor={answer.headers['X-Next-Cursor']}"
            self.through = answer.headers.get("X-Complete-Through")
            self.found += [call["xml_cdr_uuid"] for call in answer.get_json()]
        return answer


def subscribe(one: Node, other: Node) -> None:
    source = f"host={other.socket} dbname={other.name} user=postgres"
    options = "copy_data = false, origin = none"
    one.execute(f"CREATE SUBSCRIPTION calls CONNECTION '{source}' PUBLICATION everything WITH ({options})")


@pytest.fixture
def halves() -> Iterator[tuple[Half, Half]]:
    """The replication runs before schema.sql comes, which says why it makes no side tables there."""
    settings = ("wal_level = logical", "wal_retrieve_retry_interval = '200ms'")
    with ExitStack() as stack:
        nodes = [stack.enter_context(own_node(*settings)) for _ in range(2)]
        for node in nodes:
            node.execute("DROP SCHEMA cdr_api CASCADE")
            node.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        for node, other in (nodes, nodes[::-1]):
            subscribe(node, other)
        yield (set_up(nodes[0]), set_up(nodes[1]))


def dump(node: Node) -> list[str]:
    """All of FusionPBX's database but our schema and rights; pg_dump writes a key of the moment into it."""
    file, options = node.data / "before.sql", ("--exclude-schema=cdr_api", "--no-privileges")
    node.run("pg_dump", "-h", str(node.socket), "-U", "postgres", *options, "-f", str(file), node.name)
    lines = file.read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith(("\\restrict", "\\unrestrict"))]


def set_up(node: Node) -> Half:
    before = dump(node)
    (warning,) = run_schema(node)
    assert "since the publication everything takes all tables" in warning
    assert dump(node) == before
    assert any(line.startswith("CREATE PUBLICATION everything FOR ALL TABLES") for line in before)
    node.execute("CREATE DATABASE cdr_api")
    aside = SideNode(node.server, node.data, node.socket)
    assert run_schema(aside, "only") == []
    return Half(node, aside)


def copy_side_tables(source: Half, target: Half) -> None:
    """As docs/clusters.md has it."""
    dump = source.node.data / "cdr-api.dump"
    source.node.run("pg_dump", "-h", str(source.node.socket), "-U", "postgres", "-Fc", "-f", str(dump), "cdr_api")
    options = ("--clean", "--if-exists", "-d", "cdr_api")
    target.node.run("pg_restore", "-h", str(target.node.socket), "-U", "postgres", *options, str(dump))


def test_calls_go_on_replicating_and_a_client_goes_on_at_the_other_node(halves: tuple[Half, Half]) -> None:
    one, two = halves
    one.token, two.token = one.add_account(EMAIL), two.add_account(EMAIL)  # the same rows by their keys
    one.add_account("second@example.com")
    with ExitStack() as stack:
        served = [stack.enter_context(half.serve()) for half in halves]
        calls = one.store(20) | two.store(20)
        for half in halves:
            wait_for(lambda half=half: half.node.value(COUNT) == 40)  # type: ignore[misc]
        for half, gunicorn in zip(halves, served, strict=True):
            assert half.poll(gunicorn).status_code == 200
            assert sorted(half.found) == sorted(calls)
            _, lines = check(create_app({**half.settings, "CDR_API_SYSLOG": "off"}))
            assert lines["replication"] == "✓ replication        no publication takes the side tables"
            assert lines["subscription"].startswith("✓ ")
            assert scrape(gunicorn)["cdr_api_subscription_running",] == 1
            assert scrape(gunicorn)["cdr_api_subscription_lag_seconds",] < 60
        page = one.ask(served[0], f"calls?domain_name={ALPHA}&limit=15&fields=xml_cdr_uuid")
        rest = page.headers["Link"].partition("/api/")[2].partition(">")[0]

        # A token of one node is none of the other's, until its side tables are copied.
        two.token = one.token
        assert two.ask(served[1], "domains").status_code == 401
        copy_side_tables(one, two)
        served[1] = stack.enter_context(two.serve())  # restarted, since a worker keeps the key of cursors
        assert two.ask(served[1], "domains").status_code == 200

        one.node.control("-m", "immediate", "stop")
        assert one.ask(served[0], "domains").status_code == 503
        calls |= two.store(20)
        following = two.ask(served[1], rest)  # a page's cursor holds
        assert following.status_code == 200
        read = {call["xml_cdr_uuid"] for call in page.get_json() + following.get_json()}
        assert len(page.get_json()) + len(following.get_json()) == len(read) == 30
        two.place, two.found = one.place, []
        answer = two.poll(served[1])  # the feed's does not: it says where to start again
        assert answer.status_code == 410
        assert "another database or cluster" in answer.get_json()["message"]
        two.place = "from=2026-01-01"
        assert two.poll(served[1]).status_code == 200
        assert sorted(two.found) == sorted(calls)
        assert two.through is None  # a node that nobody hears may have more
        assert scrape(served[1])["cdr_api_subscription_running",] == 0

        one.node.start()
        calls |= one.store(20)
        for half in halves:
            wait_for(lambda half=half: half.node.value(COUNT) == 80)  # type: ignore[misc]
        for half, gunicorn in zip(halves, served, strict=True):
            wait_for(lambda half=half, gunicorn=gunicorn: half.poll(gunicorn).status_code == 200)  # type: ignore[misc]
            assert sorted(half.found) == sorted(calls)  # each once
            conflicts = "SELECT confl_insert_exists + confl_multiple_unique_conflicts FROM pg_stat_subscription_stats"
            assert half.node.value(conflicts) == 0


def test_accounts_move_from_beside_fusionpbx_to_a_database_of_their_own(make_database: DatabaseMaker) -> None:
    """As docs/clusters.md has it: a token goes on, and check's line drops the old tables."""
    database, aside = make_database(calls=60, index=True), make_database()
    token = database.account(ALPHA)
    database.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    aside.execute("DROP SCHEMA cdr_api CASCADE")
    aside.execute("DROP TABLE v_xml_cdr, v_domains")
    run_schema(aside, "only")
    with tempfile.TemporaryDirectory(prefix="cdr-api-") as folder:
        if database.server.system_user:
            shutil.chown(folder, database.server.system_user)
        dump, place = f"{folder}/dump", ("-h", str(database.server.socket), "-U", "postgres")
        named = ("--clean", "--if-exists")
        database.server.run("pg_dump", *place, "-Fc", *named, "-n", "cdr_api", "-f", dump, database.name)
        database.server.run("pg_restore", *place, *named, "-d", aside.name, dump)
    app = database.app(CDR_API_ACCOUNTS_DSN=aside.dsn)
    assert database.client(token, app).calls()
    status, lines = check(app)
    assert status == 1
    drop = re.search(r"DROP TABLE .*?;", lines["replication"])
    assert drop
    database.execute(drop[0])
    assert check(app)[0] == 0
    assert database.client(token, app).calls()
