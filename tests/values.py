"""Texts that a writer of JSON, CSV or COPY may stumble over, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

NASTY = st.text(
    st.sampled_from("a\"\\\n\r\t\x7f\x00\x01\x1f\x85\u2028,;:{}[]é漢📞'N").filter(lambda c: c != "\x00"), max_size=12
)
ANYTHING = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
FIXED = st.sampled_from(
    [
        "",
        "\\N",
        "\\.",
        "null",
        '"',
        '""',
        "\x7f",
        "\x7f\x7f",
        "a\x7f",
        '\\"',
        "\\",
        "\\\\",
        '"\x7f"',
        "NaN",
        "\r\n",
        "\n",
    ]
)
