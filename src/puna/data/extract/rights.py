"""What the owner of a page permits: robots directives and licences, in HTML and HTTP headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from resiliparse.parse.html import HTMLTree

ROBOTS, LICENCE, TDM = "robots", "licence", "tdm_reservation"
_LICENCE_NAMES = frozenset(
    ("license", "licence", "rights", "dc.rights", "dc.rights.license", "dcterms.rights",
     "dcterms.license", "dc.license")
)  # fmt: skip
_SIGNS = ("robots", "licen", "rights", "tdm-reservation")
_WITH_VALUE = frozenset(
    ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
)
_REL_LICENCE = re.compile(r"rel\s*=\s*[\"']?[^\"'>]*\blicense\b")
_LINK_HEADER = re.compile(r"<([^>]*)>[^,]*?;\s*rel=\"?[^\",;]*\blicense\b")
_MAX_VALUE_CHARS = 500


def page_rights(html: str, tree: HTMLTree) -> dict[str, str]:
    """Return what a page's markup says: ``robots``, ``licence`` (URL or text), ``tdm_reservation``.

    Args:
        html: The page, to see cheaply whether there is anything to look for.
        tree: The same page, parsed.
    """
    lower = html.lower()
    if not any(sign in lower for sign in _SIGNS):
        return {}
    robots: list[str] = []
    found: dict[str, str] = {}
    document: Any = tree.document
    for meta in document.get_elements_by_tag_name("meta"):
        name = (meta.getattr("name") or meta.getattr("property") or "").strip().lower()
        content = (meta.getattr("content") or "").strip()
        if not name or not content:
            continue
        if name == "robots":
            robots.append(content)
        elif name in _LICENCE_NAMES:
            found.setdefault(LICENCE, content[:_MAX_VALUE_CHARS])
        elif name == "tdm-reservation":
            found[TDM] = content[:_MAX_VALUE_CHARS]
    if "license" in lower and _REL_LICENCE.search(lower):
        for selector in ("link[rel~=license]", "a[rel~=license]"):
            for link in document.query_selector_all(selector):
                if href := (link.getattr("href") or "").strip():
                    found[LICENCE] = href[:_MAX_VALUE_CHARS]  # a URL says more than a sentence
                    break
            else:
                continue
            break
    if robots:
        found[ROBOTS] = ", ".join(robots)[:_MAX_VALUE_CHARS]
    return found


def header_rights(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the same from HTTP headers: ``X-Robots-Tag``, ``Link: rel=license``, TDMRep."""
    robots, found = [], {}
    for name, value in headers:
        lower = name.lower()
        if lower == "x-robots-tag":
            robots.append(value.strip())
        elif lower == "tdm-reservation":
            found[TDM] = value.strip()[:_MAX_VALUE_CHARS]
        elif lower == "link" and (link := _LINK_HEADER.search(value)):
            found[LICENCE] = link[1].strip()[:_MAX_VALUE_CHARS]
    if robots:
        found[ROBOTS] = ", ".join(robots)[:_MAX_VALUE_CHARS]
    return found


def merge_rights(outer: Mapping[str, Any], inner: Mapping[str, str]) -> dict[str, Any]:
    """Add what a page says to its metadata; robots directives add up, else the metadata wins."""
    merged = {**inner, **outer}
    if isinstance(outer.get(ROBOTS), str) and ROBOTS in inner and outer[ROBOTS] != inner[ROBOTS]:
        merged[ROBOTS] = f"{outer[ROBOTS]}, {inner[ROBOTS]}"
    if inner.get(TDM, "").strip() == "1":
        merged[TDM] = "1"  # one reservation is enough
    return merged


def directives(metadata: Mapping[str, Any]) -> set[str]:
    """Return the directives for all robots that a document's metadata holds, in lower case."""
    found: set[str] = set()
    value = metadata.get(ROBOTS)
    parts = value if isinstance(value, list) else [value]
    for text in parts:
        agent = ""
        for piece in str(text).lower().split(",") if isinstance(text, str) else ():
            head, colon, tail = piece.partition(":")
            if colon and head.strip() not in _WITH_VALUE:
                agent = head.strip()  # holds up to the next robot's name
            else:
                tail = piece
            if agent in ("", "*"):
                found.add(tail.strip())
    if "none" in found:
        found |= {"noindex", "nofollow"}
    if str(metadata.get(TDM, "")).strip() == "1":
        found.add("tdm-reservation")
    return found


def refused_by(metadata: Mapping[str, Any], rejected: Iterable[str]) -> str | None:
    """Return the first of the given directives that a document carries; None when it has none."""
    names = tuple(rejected)
    if not names or not (ROBOTS in metadata or TDM in metadata):
        return None
    found = directives(metadata)
    return next((name for name in names if name in found), None)
