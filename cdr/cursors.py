"""Signed texts that a client hands back, each good for one purpose."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import itsdangerous

from cdr.errors import refuse


def write_cursor(secret: bytes, purpose: Any, content: Any) -> str:
    """A signed text that is good for one purpose."""
    return str(find_signer(secret, purpose).dumps(content))


def read_cursor(secret: bytes, purpose: Any, parameter: str, text: str) -> Any:
    """The content of a signed text; ApiError 422 unless it is what write_cursor wrote."""
    signer = find_signer(secret, purpose)
    try:
        content = signer.loads(text)
    except itsdangerous.BadData:
        content = None
    # Base64 reads some changed texts as the same bytes.
    if content is None or signer.dumps(content) != text:
        refuse(parameter, "is not a cursor that this service gave for this request, or it was changed")
    return content


def find_signer(secret: bytes, purpose: Any) -> itsdangerous.URLSafeSerializer:
    return itsdangerous.URLSafeSerializer(
        secret, salt=json.dumps(purpose), signer_kwargs={"digest_method": hashlib.sha256}
    )
