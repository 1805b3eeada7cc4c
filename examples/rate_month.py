#!/usr/bin/env python3
"""What the outbound calls of a domain in a month cost, by a table of prices:

    pip install ./clients/python
    export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_…
    rate_month.py alpha.example.com 2026-01 prices.csv > bill.csv

A price counts for numbers that begin with its prefix (the longest; the number without + or 00). Of 61 seconds
60/60 (first and next) bills 120 and 30/6 bills 66. A call costs at least the minimum and is rounded half up to
0.0001; the sum is exact. Nothing is printed unless every call came and has a price.

    prefix,name,per_minute,first,next,minimum
    49,Germany,0.0120,60,60,0
    4915,Germany mobile,0.0900,30,6,0.05
"""

import csv
import os
import re
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from fusionpbx_cdr import ApiError, BrokenAnswerError, Client

NOTHING: list[Any] = [0, 0, 0, Decimal("0.0000")]  # calls, seconds, billed seconds, money

Price = dict[str, str]


def find_price(prices: dict[str, Price], number: str) -> Price:
    digits = re.sub(r"^(\+|00)", "", number)
    for length in range(len(digits), -1, -1):
        if found := prices.get(digits[:length]):
            return found
    raise ValueError(f"No prefix of the table fits {number!r}.")


def rate(seconds: int, price: Price) -> tuple[int, Decimal]:
    """What is billed of a call: seconds, and money."""
    first, step = int(price["first"]), int(price["next"])
    more = max(seconds - first, 0)
    billed = first + -(-more // step) * step  # a step that was begun counts whole
    money = max(billed * Decimal(price["per_minute"]) / 60, Decimal(price["minimum"]))
    return billed, money.quantize(Decimal("0.0001"), ROUND_HALF_UP)


def rate_month(api: Client, domain: str, month: str, prices: list[Price]) -> list[list[Any]]:
    table = {price["prefix"]: price for price in prices}
    if len(table) < len(prices):
        raise ValueError("A prefix stands in the table twice.")
    query: dict[str, Any] = {"domain_name": domain, "month": month, "direction": "outbound"}
    query |= {"answered": True, "billable_only": True}
    groups: dict[str, list[Any]] = {}
    for call in api.call_range(**query, fields=["destination_number", "billsec"]):
        price = find_price(table, call["destination_number"] or "")
        billed, money = rate(call["billsec"], price)
        sums = groups.get(price["prefix"], NOTHING)
        groups[price["prefix"]] = [a + b for a, b in zip(sums, (1, call["billsec"], billed, money), strict=True)]
    sums = [sum(column) for column in zip(NOTHING, *groups.values(), strict=True)]
    (total,) = api.totals(**query)
    if sums[:2] != [total["calls"], total["billsec"]]:
        raise ValueError(f"Read {sums[0]} calls, {sums[1]} seconds, but there are {total}: run this again.")
    rows = [[prefix, table[prefix]["name"], *groups[prefix]] for prefix in sorted(groups)]
    return [["prefix", "name", "calls", "seconds", "billed", "money"], *rows, ["", "total", *sums]]


url, token = os.environ.get("CDR_URL", ""), os.environ.get("CDR_TOKEN", "")
if len(sys.argv) != 4 or not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", sys.argv[2]) or not url or not token:
    sys.exit(f"usage: CDR_URL=… CDR_TOKEN=… {sys.argv[0]} DOMAIN YYYY-MM PRICES.csv")
try:
    with Client(url, token) as api, Path(sys.argv[3]).open(encoding="utf-8-sig", newline="") as file:  # Excel's too
        bill = rate_month(api, sys.argv[1], sys.argv[2], list(csv.DictReader(file)))
    csv.writer(sys.stdout, lineterminator="\n").writerows(bill)
except (ApiError, BrokenAnswerError, OSError, ValueError, ArithmeticError, KeyError, TypeError) as error:
    sys.exit(f"Nothing is rated: {error!r}")
