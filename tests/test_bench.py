"""The benchmark's own parts, on a database of a few thousand calls; the peers beyond the test requirements stay out."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import demo
from bench import __main__ as bench
from bench import encoders, growth
from bench.peers import __main__ as peers
from bench.peers.servers import HERE, Rival
from bench.peers.values import plain
from cdr.selection import FIELDS
from tests.conftest import wait_for

pytestmark = pytest.mark.direct("is about the benchmark")

CALLS = 2_000
SIZES = (10, 1_000)


@pytest.fixture(scope="module")
def dsn(server: demo.PostgresServer) -> str:
    bench.fill_database(server, "bench", CALLS, 0)
    bench.set_index(server, "bench", wanted=True)
    return demo.service_dsn(server, "bench")


@pytest.fixture(scope="module")
def rivals(dsn: str) -> Iterator[list[Rival]]:
    """The service, and the peer that needs nothing but the test requirements."""
    with ExitStack() as stack:
        variables = bench.compose_variables(dsn) | {"CDR_API_WORKERS": "1"}
        yield peers.enter_own(stack, variables)


@pytest.fixture(scope="module")
def ranges(server: demo.PostgresServer, dsn: str) -> list[bench.Range]:
    return [bench.find_range(server, "bench", rows) for rows in SIZES]


@pytest.fixture(scope="module")
def result(dsn: str, rivals: list[Rival], ranges: list[bench.Range], server: demo.PostgresServer) -> peers.Result:
    """A run in small."""
    one = bench.find_range(server, "bench", 1)
    peers.admit(rivals, ranges[-1], one)
    rates = peers.measure_rates(rivals, one, 1, 0.2)
    ceiling = bench.Ceiling(dsn)
    scores = [score for wanted in ranges for score in peers.measure(ceiling, rivals, wanted, 2)]
    return peers.Result(SIZES, scores, rates, rates, {})


def test_a_run_scores_every_contestant_at_every_size(result: peers.Result) -> None:
    names = [peers.SERVICE, "Flask, psycopg: fetchall + jsonify"]
    assert result.names == names
    assert [(score.name, score.rows) for score in result.scores] == [
        (name, rows) for rows in SIZES for name in (bench.CEILING, *names)
    ]
    assert list(result.rates) == [peers.NOTHING, *names]
    assert all(rate > 0 for rate in result.rates.values())


def test_the_share_of_the_ceiling_is_paired_within_each_turn() -> None:
    seconds = {bench.CEILING: [1.0, 4.0, 1.0], "peer": [2.0, 5.0, 10.0]}
    found = peers.score("peer", 10, seconds, [1.0, 3.0, 2.0], 7)
    assert found == peers.Score("peer", 10, seconds=5.0, share=0.5, first=2.0, peak=7)


def test_the_ceiling_is_all_of_itself(result: peers.Result) -> None:
    assert {score.share for score in result.scores if score.name == bench.CEILING} == {1.0}


def test_peers_without_a_good_token_are_told_so(rivals: list[Rival], ranges: list[bench.Range]) -> None:
    for rival in rivals:
        page = dataclasses.replace(rival.page, token="wrong")
        with pytest.raises(SystemExit, match="status 401"):
            page.read(ranges[0])


def test_a_peer_that_gives_other_values_is_not_admitted(rivals: list[Rival], ranges: list[bench.Range]) -> None:
    ours = rivals[0].page
    late = bench.Range(ranges[0].rows, ranges[1].first, ranges[1].last)
    with pytest.raises(SystemExit, match="calls expected"):
        bench.compare(ours, rivals[1].page, late, plain)
    fewer = dataclasses.replace(ours, parameters={"fields": "xml_cdr_uuid"})
    with pytest.raises(SystemExit, match="other fields"):
        bench.compare(ours, fewer, ranges[0], plain)


@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"most_bytes": 1_000_000}, "> 0.001 GB"), ({"most_seconds": 0.0}, "> 0 s")],
)
def test_a_peer_that_takes_too_much_is_stopped(
    dsn: str, rivals: list[Rival], ranges: list[bench.Range], limit: dict[str, Any], reason: str
) -> None:
    with bench.serve(bench.compose_variables(dsn) | {"CDR_API_WORKERS": "1"}, "bench.jsonify_app:app") as web:
        page = bench.Page(web, "/call_range", {}, rivals[0].page.token)
        rival = Rival("greedy", page, **limit)
        wait_for(lambda: bool(web.workers()))
        workers = web.workers()
        scores = peers.measure(bench.Ceiling(dsn), [rival], ranges[-1], 2)
        assert [score.name for score in scores] == [bench.CEILING]
        assert rival.stopped == reason
        wait_for(lambda: not any(bench.read(Path(f"/proc/{pid}/cmdline")) for pid in workers))


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("end_stamp", "2026-08-25T10:33:26+00:00", "2026-08-25 12:33:26+02"),
        ("end_stamp", "2026-08-25T10:33:26+00:00", "2026-08-25T10:33:26Z"),
        ("end_stamp", "2026-08-25T10:33:26+00:00", "Tue, 25 Aug 2026 10:33:26 GMT"),
        ("answer_stamp", None, "1970-01-01 00:00:00+00"),
        ("billsec", 60, "60"),
        ("end_epoch", "1714636820", 1714636820),
        ("rtp_audio_in_mos", 4.5, "4.50"),
        ("hangup_cause_q850", "16", 16),
    ],
)
def test_values_that_mean_the_same_are_alike(name: str, one: Any, other: Any) -> None:
    assert plain(name, one) == plain(name, other)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("end_stamp", "2026-08-25T10:33:26+00:00", "2026-08-25T10:33:27+00:00"),
        ("end_stamp", None, "2026-08-25T10:33:27+00:00"),
        ("billsec", 60, 61),
        ("billsec", 0, None),
        ("rtp_audio_in_mos", 4.5, "4.51"),
        ("missed_call", True, 1),
        ("missed_call", False, "f"),
        ("read_rate", "8000", 8000),
        ("caller_id_name", "", None),
    ],
)
def test_values_that_differ_stay_different(name: str, one: Any, other: Any) -> None:
    assert plain(name, one) != plain(name, other)


def made_up(stopped: str = "") -> peers.Result:
    """Two contestants and the ceiling; the peer is stopped at the larger size, if a reason is given."""
    scores = [
        peers.Score(name, rows, seconds=rows / speed, share=speed / 1000, first=0.004, peak=50_000_000)
        for rows in (1_000, 1_000_000)
        for name, speed in ((bench.CEILING, 1000), (peers.SERVICE, 750), ("R&D <peer>", 100))
        if not (stopped and rows == 1_000_000 and name == "R&D <peer>")
    ]
    rates = {peers.NOTHING: 2000.0, peers.SERVICE: 1000.0, "R&D <peer>": 1500.0}
    return peers.Result(
        [1_000, 1_000_000], scores, rates, {peers.SERVICE: 900.0}, {"R&D <peer>": stopped} if stopped else {}
    )


def test_the_tables_show_who_was_stopped_and_why() -> None:
    text = peers.show_sizes(made_up("> 4 GB"))
    assert "| the service | 75% (750) | 75% (750) |\n" in text
    assert "| R&D <peer> | 10% (100) | > 4 GB |\n" in text
    assert "| the service | 50 | 50 |\n" in text
    assert "| the service | 4 | 4 |\n" in text
    rates = peers.show_rates(made_up().rates, made_up().same_rates)
    assert "| R&D <peer> | 1,500 (150%) | – |\n" in rates
    assert "| the service | 1,000 (100%) | 900 (100%) |\n" in rates


@pytest.mark.parametrize("stopped", ["> 4 GB", ""])
def test_the_picture_is_svg_with_every_point_within_it(stopped: str) -> None:
    root = ET.fromstring(peers.plot(made_up(stopped)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    places = re.findall(r"translate\(([\d.-]+) ([\d.-]+)\)", " ".join(e.get("transform", "") for e in root))
    points = 3 if stopped else 4
    assert len(places) == 2 + 3 * points  # the legend's, then three panels'
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in places)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("✕") == (3 if stopped else 0)
    assert "R&D <peer>" in texts


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{peers.BEGIN}old\n{peers.END}after\n", "utf-8")
    for text in ("first", "second"):
        peers.write_readme(text, readme)
    assert readme.read_text("utf-8") == f"before\n{peers.BEGIN}\nsecond\n{peers.END}after\n"
    readme.write_text("no markers", "utf-8")
    with pytest.raises(SystemExit, match="lacks the lines"):
        peers.write_readme("third", readme)
    assert readme.read_text("utf-8") == "no markers"


def test_the_readme_has_the_markers_once() -> None:
    text = peers.README.read_text("utf-8")
    assert text.count(peers.BEGIN) == text.count(peers.END) == 1


def test_the_django_model_has_the_fields_of_the_service_in_their_order() -> None:
    found = re.findall(r"^    (\w+) = models\.", (HERE / "django_app.py").read_text("utf-8"), re.MULTILINE)
    assert tuple(found) == FIELDS


def test_growth_stands_beside_its_ideal(server: demo.PostgresServer) -> None:
    for _ in range(2):  # the second time with the data of the first
        growth.make_database(server, "bench_growth", 1_500)
    site = growth.Site(server, "bench_growth")
    lines = [*growth.measure_pages(site), *growth.measure_polls(site)]
    for place in (site, growth.open_apart(server, "bench_growth")):
        lines += growth.measure_domains(place, [0, 3])
        place.close()
    assert len(lines) == 6 + 3 + 2 * (2 * 3 * 2)
    assert all(re.fullmatch(r"\| [a-z0-9, -]+ \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \|", line) for line in lines)
    assert len(lines) == len({line.split("|")[1] for line in lines})


def test_the_encoders_stand_beside_the_ceiling(server: demo.PostgresServer, speedups: Path) -> None:
    lines = list(encoders.run(server, 1_500, runs=1, xml_bytes=0))
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| COPY CSV, thrown away",
        "| JSON, Python",
        "| JSON, C",
        "| CSV",
    ]
    costs = [list(map(float, line.strip("| ").split(" | ")[1:])) for line in lines[2:]]
    assert costs[0][0] == 0
    assert all(database > 0 for _, database, _ in costs)
    assert all(service > 0 for service, _, _ in costs[1:])
