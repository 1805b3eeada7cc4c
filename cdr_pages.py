"""GET /api/openapi.json, /api/docs and /api/usage: the description of the routes, and the static files of pages/."""

from __future__ import annotations

import functools
import hashlib
import html
import json
from pathlib import Path
from urllib.parse import quote

from flask import Blueprint, Flask, Response, current_app, request
from werkzeug.exceptions import NotFound

from cdr.parsing import parse_pairs, read_pairs
from cdr.service import Service
from cdr.settings import Settings

description = Blueprint("description", __name__, url_prefix="/api")
pages = Blueprint("pages", __name__, url_prefix="/api")

DESCRIPTION = json.loads(Path(__file__).with_name("openapi.json").read_text("utf-8"))
PAGES = Path(__file__).with_name("pages")
LIBRARIES = ("vendor/chart.umd.min.js",)
SCRIPTS = ("docs", "files", "format", "job", "month", "overview", "plots", "session", "table", "usage")
# The only files of pages/ that are served, by their last names.
ASSETS = {Path(name).name: name for name in (*(f"{name}.js" for name in SCRIPTS), "icon.svg", "pages.css", *LIBRARIES)}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

PAGE_HEADERS = {
    # Nothing from elsewhere and nothing inline. Forms are sent by scripts only, so that a password cannot get into
    # a URL should these not load.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


@functools.lru_cache(maxsize=16)
def describe(path: str) -> bytes:
    """The description of the service below a public path."""
    servers = [{**server, "url": path} for server in DESCRIPTION["servers"]]
    return json.dumps({**DESCRIPTION, "servers": servers}, ensure_ascii=False).encode() + b"\n"


def answer_file(content: bytes, media_type: str) -> Response:
    """A file that is kept, and checked each time by its ETag: an upgrade never mixes old with new."""
    parse_pairs(read_pairs(request.query_string), {})
    response = Response(content, mimetype=media_type)
    response.headers["Cache-Control"] = "no-cache"
    response.set_etag(hashlib.sha256(content).hexdigest()[:32])
    response.make_conditional(request)
    return response


@description.get("/openapi.json")
def openapi() -> Response:
    """The description. A trusted proxy says by X-Forwarded-Prefix what its public path is for /api."""
    return answer_file(describe(quote(request.script_root) or "/api"), "application/json")


@functools.cache
def read_page(name: str) -> bytes:
    return (PAGES / name).read_bytes()


def answer_page(name: str, content: bytes | None = None) -> Response:
    response = answer_file(content or read_page(name), MEDIA_TYPES[Path(name).suffix])
    response.headers |= PAGE_HEADERS
    return response


@pages.get("/docs")
def docs() -> Response:
    return answer_page("docs.html")


@pages.get("/usage")
def usage() -> Response:
    """The page, which is told the name of the service's zone: by default months are those of that zone."""
    service: Service = current_app.extensions["cdr_api"]
    zone = f'data-zone="{html.escape(service.known_zone)}"'.encode()
    return answer_page("usage.html", read_page("usage.html").replace(b'data-zone=""', zone))


@pages.get("/assets/<name>")
def assets(name: str) -> Response:
    if name not in ASSETS:
        raise NotFound
    return answer_page(ASSETS[name])


def register_pages(app: Flask, settings: Settings) -> None:
    app.register_blueprint(description)
    if settings.pages == "on":
        app.register_blueprint(pages)
