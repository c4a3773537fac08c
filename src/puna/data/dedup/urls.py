"""Two spellings of one URL: the normal form under which documents count as the same page.

After RFC 3986, section 6.2 (case, percent-encoding, dot segments, default port), and beyond it what
web crawls need (ours): the scheme, ``www.``, ``index.html``, a slash at the end, the fragment, and
parameters that track a visitor do not tell pages apart; the order of parameters does not either.
"""

from __future__ import annotations

import json
import posixpath
import re
from urllib.parse import SplitResult, quote, unquote, urlsplit

import xxhash

_DEFAULT_PORTS = {None, 80, 443}
_INDEX_PAGES = ("/index.html", "/index.htm")
_SESSION = re.compile(r";(?:jsessionid|phpsessid)=[^/?]*", re.IGNORECASE)
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_TRACKING = frozenset(
    ("gclid", "dclid", "gbraid", "wbraid", "fbclid", "msclkid", "yclid", "igshid", "twclid",
     "mc_cid", "mc_eid", "_ga", "_gl", "_hsenc", "_hsmi", "mkt_tok", "jsessionid", "phpsessid",
     "wt_mc", "ref_src", "spm")
)  # fmt: skip
"""Parameters that name a campaign, a click or a session; besides ``utm_*``."""


def normal_url(url: str) -> str | None:
    """Return the normal form of a web address, without its scheme.

    Args:
        url: Any string.

    Returns:
        ``host[:port]/path[?query]``; None for what is no ``http`` or ``https`` URL with a host.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host:
        return None
    host = host.rstrip(".").removeprefix("www.")
    place = host if port in _DEFAULT_PORTS else f"{host}:{port}"
    query = _normal_query(parts.query)
    fragment = f"#{parts.fragment}" if parts.fragment.startswith("!") else ""  # a page of its own
    return f"{place}{_normal_path(parts)}{query}{fragment}"


def _normal_path(parts: SplitResult) -> str:
    path = _normal_escapes(_SESSION.sub("", parts.path))
    if "/." in path:
        path = posixpath.normpath(path)
    path = path.rstrip("/")
    while path.endswith(_INDEX_PAGES):
        path = path.rpartition("/")[0].rstrip("/")
    return path


def _normal_query(query: str) -> str:
    if not query:
        return ""
    fields = (_normal_escapes(field) for field in query.split("&") if field)
    kept = (field for field in fields if not _is_tracking(field.partition("=")[0].lower()))
    found = "&".join(sorted(kept))
    return f"?{found}" if found else ""


def _is_tracking(name: str) -> bool:
    return name.startswith("utm_") or name in _TRACKING


def _normal_escapes(text: str) -> str:
    """Undo escapes that need none, write the others in upper case, escape spaces and non-ASCII."""
    if "%" in text:
        text = _ESCAPE.sub(_normal_escape, text)
    plain = text.isascii() and " " not in text
    return text if plain else quote(text, safe="".join(map(chr, range(33, 127))))


def _normal_escape(match: re.Match[str]) -> str:
    char = unquote(match[0])
    return char if char in _UNRESERVED else match[0].upper()


def url_of(path: str, metadata: str, field: str) -> str | None:
    """Return the normal form of a document's URL.

    Args:
        path: Path of the document, which may be a URL itself.
        metadata: JSON object.
        field: Key of the URL in the metadata.

    Returns:
        None for a document without a web address.
    """
    if f'"{field}"' in metadata:
        value = json.loads(metadata).get(field)
        if isinstance(value, str) and (found := normal_url(value)) is not None:
            return found
    return normal_url(path) if path.startswith(("http://", "https://")) else None


def url_hash(path: str, metadata: str, field: str) -> bytes | None:
    """Return the xxh3-128 of the normal form of a document's URL, None without one."""
    found = url_of(path, metadata, field)
    return None if found is None else xxhash.xxh3_128_digest(found.encode("utf-8", "replace"))
