#!/usr/bin/env python3
"""The calls of a domain that ended in a month, one JSON object a line:

    export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_…
    month.py alpha.example.com 2026-01 calls.ndjson

The file is there whole or not at all: every page came to its end, and calls and
seconds are those that call_totals counts.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

API, TOKEN = os.environ.get("CDR_URL", ""), os.environ.get("CDR_TOKEN", "")
FIELDS = "xml_cdr_uuid,start_stamp,end_stamp,direction,accountcode,caller_id_number,destination_number,billsec"


def ask(route: str, query: dict[str, str]) -> Iterator[Any]:
    """An answer's pages; waits while the service is busy."""
    url, tries = f"{API}/{route}?{urlencode(query)}", 10
    while url:
        if not url.startswith(f"{API}/"):
            raise ValueError(f"The next page is elsewhere, at {url}: is CDR_API_PROXIES right?")
        request = Request(url)
        request.add_unredirected_header("Authorization", f"Bearer {TOKEN}")  # for this host only
        try:
            with urlopen(request, timeout=600) as answer:
                found = re.match('<(.+)>; rel="next"', answer.headers.get("Link", ""))
                yield json.loads(answer.read())  # both fail if it broke off
                url = found[1] if found else ""
        except HTTPError as error:
            tries -= 1
            if error.code not in {429, 503} or not tries:
                raise ValueError(f"{error.code}: {error.read().decode(errors='replace')}") from None
            seconds = int(error.headers.get("Retry-After", "30"))
            print(f"{error.code}: waiting {seconds} s.", file=sys.stderr, flush=True)
            time.sleep(seconds)


def save_month(domain: str, month: str, file: Path) -> str:
    query = {"domain_name": domain, "month": month, "billable_only": "true"}
    part = file.with_name(f"{file.name}.{os.getpid()}")
    count = seconds = 0
    try:
        with part.open("x", encoding="utf-8") as output:
            for calls in ask("call_range", query | {"fields": FIELDS, "limit": "10000"}):
                output.writelines(json.dumps(call, ensure_ascii=False) + "\n" for call in calls)
                count, seconds = count + len(calls), seconds + sum(call["billsec"] for call in calls)
        ((total,),) = ask("call_totals", query)
        if (count, seconds) != (total["calls"], total["billsec"]):
            raise ValueError(f"Read {count} calls, {seconds} seconds, but there are {total}: run this again.")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return f"{count} calls, {seconds} seconds"


if len(sys.argv) != 4 or not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", sys.argv[2]) or not API or not TOKEN:
    sys.exit(f"usage: CDR_URL=… CDR_TOKEN=… {sys.argv[0]} DOMAIN YYYY-MM FILE")
try:
    print(save_month(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
except (OSError, HTTPException, ValueError) as error:
    sys.exit(f"Nothing is kept: {error!r}")
