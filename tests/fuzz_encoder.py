"""Batches by chance for the C encoder, until the time is over: python -m tests.fuzz_encoder FOLDER SECONDS [SEED]

tests/test_encoder.py runs it with the encoder built for sanitizers, which end it at the first byte that is read or
written where none may be. It ends too when C makes other bytes than the Python encoder, or leaves to that one
what COPY may write.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from tests.encoders import Batches, Encode, as_views, load_encoder, take

BYTES = st.lists(st.binary(max_size=40) | st.binary(max_size=40).map(lambda row: row + b"\n"), max_size=4)


def fuzz(encode: Encode, seed: int, until: float) -> tuple[int, int]:
    """How many batches there were, and how many of them C took."""
    batches, count, taken = Batches(seed), 0, 0
    while time.monotonic() < until:
        fields = batches.fields()
        rows = batches.rows(len(fields))
        assert take(encode, fields, rows) is not None, (fields, rows)
        changed = [batches.change(row) if batches.random.random() < 0.5 else row for row in rows]
        for odd in (changed, batches.noise()):
            taken += take(encode, fields, odd) is not None
            # Without keys the answer is too small for a row of too few cells: no check of a write is in vain.
            encode(as_views(odd), b"", (b"",) * len(fields), b"")
        count += 3
        taken += 1
    return count, taken


def fuzz_by_hypothesis(encode: Encode, examples: int) -> None:
    @hypothesis.settings(max_examples=examples, deadline=None, database=None)
    @hypothesis.given(BYTES, st.integers(1, 4))
    def compare(rows: list[bytes], width: int) -> None:
        take(encode, ["a"] * width, rows)

    compare()


def main(folder: str, seconds: str, seed: str = "") -> None:
    encode, began = load_encoder(Path(folder)), time.monotonic()
    seed = seed or str(time.time_ns())
    sys.stdout.write(f"seed {seed}: ")
    sys.stdout.flush()
    examples = int(20 * float(seconds))
    fuzz_by_hypothesis(encode, examples)
    count, taken = fuzz(encode, int(seed), began + float(seconds))
    sys.stdout.write(f"{examples:,} batches by hypothesis, {count:,} others, of which C took {taken:,}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
