"""nginx in front of the service: the files of deploy/, the one line in FusionPBX's own, and what comes through."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
FUSIONPBX_SITE = Path("/etc/nginx/sites-available/fusionpbx")
OWN_SITE = Path("/etc/nginx/sites-available/cdr-api")
OWN_LINK = Path("/etc/nginx/sites-enabled/cdr-api")
OWN_PORT = 8443
CERTIFICATE = Path("/etc/ssl/certs/nginx.crt")
# Each shipped file, and where nginx reads it; the last one only on a port of its own.
FILES = {
    "nginx-http.conf": Path("/etc/nginx/conf.d/cdr-api.conf"),
    "nginx-path.conf": Path("/etc/nginx/snippets/cdr-api.conf"),
    "nginx-server.conf": OWN_SITE,
}
# dpkg's list of the package's files: it installed those above, and removes them itself.
PACKAGE = Path("/var/lib/dpkg/info/cdr-api.list")
# A pattern, which may match nothing: nginx goes on when the file is removed before this line.
INCLUDE = "include snippets/cdr-api[.]conf;"
WAIT_SECONDS = 20


class NginxError(Exception):
    """nginx refuses its files; the message is what it says."""


# Files ------------------------------------------------------------------------


def replace_file(path: Path, text: str) -> None:
    """Writes a file that is there as a whole, or not at all; it keeps its owner and its mode."""
    found, new = path.stat(), path.with_name(f".{path.name}.new")
    new.write_text(text, "utf-8")
    os.chown(new, found.st_uid, found.st_gid)
    new.chmod(found.st_mode & 0o7777)
    new.replace(path)


def find_server(text: str) -> tuple[int, int] | None:
    """Where in a file of nginx's the block of the server for https stands, from "{" to "}"."""
    blank = re.sub(r"#[^\n]*", lambda found: " " * len(found[0]), text)  # comments hold anything
    for opening in re.finditer(r"\bserver\s*\{", blank):
        depth, place = 1, opening.end()
        while depth and place < len(blank):
            depth += {"{": 1, "}": -1}.get(blank[place], 0)
            place += 1
        if re.search(r"\blisten\s[^;]*\bssl\b", blank[opening.end() : place]):
            return opening.end(), place
    return None


def has_include(text: str) -> bool:
    return bool(re.search(rf"^[^#\n]*{re.escape(INCLUDE)}", text, re.MULTILINE))


def add_include(text: str) -> str | None:
    """FusionPBX's file with the line in its server for https, below server_name; None if there is no such server."""
    found = find_server(text)
    if not found:
        return None
    start, end = found
    name = re.compile(r"^[ \t]*server_name\s[^;#]*;[^\n]*\n", re.MULTILINE).search(text, start, end)
    place = name.end() if name else text.index("\n", start) + 1
    return f"{text[:place]}    {INCLUDE}\n{text[place:]}"


def remove_include(text: str) -> str:
    return re.sub(rf"^[ \t]*{re.escape(INCLUDE)}[ \t]*\n", "", text, flags=re.MULTILINE)


def find_port() -> int:
    """Where the server listens that leads to the service."""
    text = (OWN_SITE if OWN_LINK.is_symlink() else FUSIONPBX_SITE).read_text("utf-8")
    start, end = find_server(text) or (0, 0)
    found = re.search(r"^\s*listen\s+(?:[^;\s]*:)?(\d+)\b[^;]*\bssl\b", text[start:end], re.MULTILINE)
    return int(found[1]) if found else 443


def find_way() -> str | None:
    """The way that is set up: path, port, or None."""
    if OWN_LINK.is_symlink():
        return "port"
    return "path" if FUSIONPBX_SITE.is_file() and has_include(FUSIONPBX_SITE.read_text("utf-8")) else None


def has_files() -> bool:
    return any(path.exists() for path in FILES.values())


# nginx itself -----------------------------------------------------------------


def validate() -> None:
    """Raises NginxError with what nginx -t says, if it is not content."""
    done = subprocess.run(["nginx", "-t"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NginxError(done.stderr.strip())


def reload() -> None:
    subprocess.run(["systemctl", "reload", "nginx"], check=True, capture_output=True, text=True)


def install(way: str) -> None:
    """Puts the files and the line of a way in their places and reloads nginx.

    Raises NginxError, and leaves everything as it was, if nginx refuses them.
    """
    validate()
    copied = []
    site = FUSIONPBX_SITE.read_text("utf-8") if way == "path" else ""
    for name, path in FILES.items():
        if not path.exists() and (way == "port" or path != OWN_SITE):
            shutil.copyfile(HERE / "deploy" / name, path)
            copied.append(path)
    try:
        if way == "port":
            OWN_LINK.symlink_to("../sites-available/cdr-api")
            copied.append(OWN_LINK)
        else:
            replace_file(FUSIONPBX_SITE, add_include(site) or site)
        validate()
    except BaseException:
        for path in copied:
            path.unlink()
        if way == "path":
            replace_file(FUSIONPBX_SITE, site)
        raise
    reload()


def remove() -> bool:
    """Takes back what install did; whether there was anything. Raises NginxError if nginx refuses what is left."""
    before = OWN_LINK.is_symlink()
    OWN_LINK.unlink(missing_ok=True)
    if FUSIONPBX_SITE.is_file():
        site = FUSIONPBX_SITE.read_text("utf-8")
        if (without := remove_include(site)) != site:
            replace_file(FUSIONPBX_SITE, without)
            before = True
    for path in FILES.values():
        if path.exists() and not PACKAGE.exists():
            path.unlink()
            before = True
    if before and shutil.which("nginx"):
        validate()
        reload()
    return before


# What comes through -----------------------------------------------------------


def trust(file: Path | None) -> ssl.SSLContext:
    """Who believes the signers that the system knows, and those of a file."""
    context = ssl.create_default_context()
    if file and file.is_file():
        context.load_verify_locations(file)
    return context


def ask_health(address: str, host: str, port: int) -> bool:
    """Whether the service answers through nginx. The certificate does not matter here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(address, port, context=context, timeout=5)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", "/cdr-api/health", headers={"Host": host})
        return connection.getresponse().status == 200
    return False


def wait_for_health(host: str, port: int) -> bool:
    """The same on this machine, when nginx's workers have been replaced at the latest."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not ask_health("127.0.0.1", host, port):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def read_names(host: str, port: int, context: ssl.SSLContext) -> list[str] | None:
    """The names in the certificate that nginx shows for a host; None if the context does not believe it."""
    try:
        plain = socket.create_connection(("127.0.0.1", port), 10)
        with plain, context.wrap_socket(plain, server_hostname=host) as connection:
            names: Any = (connection.getpeercert() or {}).get("subjectAltName", ())
            return [name for kind, name in names if kind == "DNS"]
    except OSError:
        return None


def find_host(port: int) -> str:
    """This machine's name, if nginx's certificate is for it; otherwise the first that the certificate is for."""
    own, anybody = socket.getfqdn(), trust(CERTIFICATE)
    if read_names(own, port, anybody) is not None:
        return own
    anybody.check_hostname = False
    names = [name for name in read_names(own, port, anybody) or () if "*" not in name]
    return names[0] if names else own


def curl_options(host: str, port: int) -> list[str]:
    """What curl needs on this machine to reach a host, and to believe its certificate.

    One that cannot be believed is taken as it is, since it goes no further than this machine.
    """
    direct = ask_health(host, host, port)
    here = [] if direct else ["--connect-to", f"{host}:{port}:127.0.0.1:{port}"]
    if read_names(host, port, trust(None)) is not None:
        return here
    if read_names(host, port, trust(CERTIFICATE)) is not None:
        return [*here, "--cacert", str(CERTIFICATE)]
    return ["--connect-to", f"{host}:{port}:127.0.0.1:{port}", "--insecure"]
