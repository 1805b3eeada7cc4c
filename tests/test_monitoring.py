"""The alert rules and the dashboard of deploy/: every metric in them is there, and Prometheus takes them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import REGISTRY

from cdr_metrics import GAUGES
from tests.clients import calls_url, curl, scrape
from tests.conftest import ROOT, Database, DatabaseMaker, serve, wait_for
from tests.servers import own_node, standby_of

RULES = ROOT / "deploy/prometheus-rules.yml"
DASHBOARD = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text("utf-8"))
promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not here; on Debian and Ubuntu: apt install prometheus"
)


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """The newest call ended an hour ago, and one will end in an hour."""
    database = make_database(index=True)
    alpha = "(SELECT domain_uuid FROM v_domains WHERE domain_name = 'alpha.example.com')"
    for hours in (-5, -1, 1):
        insert = "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, end_stamp) VALUES (gen_random_uuid(), {}, {})"
        database.execute(insert.format(alpha, f"now() + interval '{hours} h'"))
    return database


def expressions() -> list[str]:
    """What the panels of the dashboard show, with Grafana's interval as a time."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [expression.replace("$__rate_interval", "5m") for expression in targets]


def known_metrics() -> set[str]:
    """The names under which Prometheus finds what cdr_metrics counts."""
    names = {*GAUGES, "cdr_api_feed_holder_seconds"}
    for family in REGISTRY.collect():
        names |= {f"{family.name}{end}" for end in ("", "_total", "_bucket", "_sum", "_count")}
    return {name for name in names if name.startswith("cdr_api_")}


@pytest.mark.parametrize("text", [RULES.read_text("utf-8"), "\n".join(expressions())], ids=["rules", "dashboard"])
def test_every_metric_that_is_named_is_one_of_the_service(text: str) -> None:
    named = set(re.findall(r"\bcdr_api_\w+", text))
    assert len(named) > 8
    assert named <= known_metrics()
    assert named >= set(GAUGES) - {"cdr_api_live_tokens", "cdr_api_subscription_running"}


def test_the_databases_are_asked_at_each_scrape(database: Database) -> None:
    database.account("alpha.example.com", days=10)
    token = database.account("alpha.example.com", days=100)
    with serve(database.dsn, CDR_API_METRICS="on") as gunicorn:
        assert curl(calls_url(gunicorn), token, "--fail").returncode == 0
        found = scrape(gunicorn)
        assert (found["cdr_api_live_tokens",], found["cdr_api_expiring_tokens",]) == (2, 1)
        assert 3600 <= found["cdr_api_newest_call_age_seconds",] < 3 * 3600
        assert found["cdr_api_feed_lag_seconds",] < 60
        assert not [name for name, *_ in found if "standby" in name or "subscription" in name]
        with psycopg.connect(f"{database.server.get_uri(database.name)}&application_name=writer") as connection:
            connection.execute("CREATE TABLE held (x int)")
            wait_for(lambda: [name for name, *who in scrape(gunicorn) if who and ", writer" in who[0]])


def test_what_one_database_cannot_tell_is_left_out(database: Database) -> None:
    with serve(database.dsn, CDR_API_METRICS="on") as gunicorn:
        database.execute("ALTER TABLE cdr_api.tokens RENAME TO away")
        found = scrape(gunicorn)
        database.execute("ALTER TABLE cdr_api.away RENAME TO tokens")
    assert ("cdr_api_newest_call_age_seconds",) in found
    assert ("cdr_api_live_tokens",) not in found


@pytest.mark.direct("runs servers of its own")
def test_a_standby_tells_how_far_it_is_behind() -> None:
    with (
        own_node() as node,
        standby_of(node) as standby,
        serve(node.dsn("cdr_api"), CDR_API_CALLS_DSN=standby.dsn("cdr_api"), CDR_API_METRICS="on") as gunicorn,
    ):
        node.execute("CREATE TABLE made (x int)")  # until it has replayed a transaction it knows no time
        wait_for(lambda: standby.value("SELECT to_regclass('made')"))
        assert 0 <= scrape(gunicorn)["cdr_api_standby_lag_seconds",] < 60


# Prometheus' own tool ---------------------------------------------------------


def run_promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_the_rules_and_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    run_promtool("check", "rules", str(RULES))
    rules = [{"record": f"panel:{number}", "expr": found} for number, found in enumerate(expressions())]
    file = tmp_path / "dashboard.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), "utf-8")
    run_promtool("check", "rules", str(file))


# What each minute brings of a series, by the alert that it raises within half an hour.
ALERTS = {
    "CdrApiFeedHeldBack": ("cdr_api_feed_lag_seconds", "600+60x90"),
    "CdrApiNoNewCalls": ("cdr_api_newest_call_age_seconds", "50000x90"),
    "CdrApiBrokenAnswers": ('cdr_api_broken_streams_total{route="/api/calls"}', "_x20 1x70"),
    "CdrApiUnavailable": ('cdr_api_requests_total{route="/api/calls",status="503"}', "0+10x90"),
    "CdrApiTooManyRequests": ('cdr_api_requests_total{route="/api/calls",status="429"}', "0+60x90"),
    "CdrApiErrors": ('cdr_api_requests_total{route="/api/calls",status="504"}', "0x20 1x70"),
    "CdrApiFailedLogins": ('cdr_api_failed_logins_total{kind="token"}', "0+20x90"),
    "CdrApiTokensExpire": ("cdr_api_expiring_tokens", "1x90"),
    "CdrApiStandbyLag": ("cdr_api_standby_lag_seconds", "400x90"),
    "CdrApiSubscriptionStopped": ("cdr_api_subscription_running", "0x90"),
    "CdrApiSubscriptionLag": ("cdr_api_subscription_lag_seconds", "400x90"),
    "CdrApiFallbacks": ('cdr_api_fallbacks_total{statement="calls",reason="42P01"}', "_x20 1x70"),
}
LATE = {"CdrApiTokensExpire": "70m"}
QUIET = {"cdr_api_feed_lag_seconds": "1x90", "cdr_api_expiring_tokens": "0x90", "cdr_api_subscription_running": "1x90"}


def fires(series: dict[str, str], when: str, names: list[str]) -> dict[str, Any]:
    """A test of promtool's: by then these alerts fire, and no other."""
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names]
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": firing, "eval_time": when, "exp_samples": samples}],
    }


@promtool
def test_each_alert_fires_when_it_should_and_no_other(tmp_path: Path) -> None:
    assert set(re.findall(r"alert: (\w+)", RULES.read_text("utf-8"))) == set(ALERTS)
    tests = [fires({series: values}, LATE.get(name, "30m"), [name]) for name, (series, values) in ALERTS.items()]
    tests.append(fires(QUIET, "80m", []))
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}), "utf-8")
    run_promtool("test", "rules", str(file))
