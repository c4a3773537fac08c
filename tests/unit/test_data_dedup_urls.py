"""URLs: which spellings name one page, and which do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data.dedup.urls import normal_url, url_hash, url_of
from puna.data.schema import dump_metadata

SAME = [
    "http://example.com/a/b?x=1&y=2",
    "https://EXAMPLE.com/a/b?y=2&x=1",
    "https://www.example.com:443/a/b/?x=1&y=2#part",
    "http://example.com.:80/a/./c/../b?x=1&utm_source=feed&y=2&gclid=abc",
    "https://user:word@example.com/%61/b/index.html?x=1&y=2&",
    " https://example.com/a/b;jsessionid=0AF?x=1&y=2",
]
DIFFERENT = [
    "https://example.com/a/b?x=2&y=1",
    "https://example.com/A/b?x=1&y=2",
    "https://example.com:8080/a/b?x=1&y=2",
    "https://sub.example.com/a/b?x=1&y=2",
    "https://example.com/a%2Fb?x=1&y=2",
    "https://example.com/a/b?x=1&y=2#!page",
    "https://example.com/a/b.html?x=1&y=2",
    "https://example.com/a/b",
]


@pytest.mark.parametrize("url", SAME)
def test_spellings_of_one_page(url: str) -> None:
    assert normal_url(url) == "example.com/a/b?x=1&y=2"


def test_other_pages() -> None:
    found = [normal_url(url) for url in [SAME[0], *DIFFERENT]]
    assert None not in found
    assert len(set(found)) == len(found)


def test_escapes() -> None:
    assert normal_url("https://x.org/%7euser/%e4%b8%ad") == "x.org/~user/%E4%B8%AD"
    assert normal_url("https://x.org/中") == "x.org/%E4%B8%AD"
    assert normal_url("https://x.org/a b%") == normal_url("https://x.org/a b%")


@pytest.mark.parametrize(
    "url", ["", "a/b.html", "ftp://x.org/a", "https://", "http://[::1/", "https://x.org:99999/",
            "mailto:a@b.c", "file:///etc/motd", "//x.org/a"],
)  # fmt: skip
def test_what_is_no_web_address(url: str) -> None:
    assert normal_url(url) is None


@given(st.text(alphabet="aB1%2f/.?&=#;: ä中!~_-", max_size=40))
def test_normalising_twice_changes_nothing(rest: str) -> None:
    once = normal_url(f"https://x.org/{rest}")
    if once is not None:
        assert normal_url(f"http://{once}") == once


def test_where_the_url_of_a_document_stands() -> None:
    metadata = dump_metadata({"url": "https://x.org/m", "other": "https://x.org/o"})
    assert url_of("https://x.org/p", metadata, "url") == "x.org/m"
    assert url_of("https://x.org/p", metadata, "other") == "x.org/o"
    assert url_of("https://x.org/p", metadata, "none") == "x.org/p"
    assert url_of("https://x.org/p", dump_metadata({"url": 7}), "url") == "x.org/p"
    assert url_of("a/b.txt", dump_metadata({"url": "no address"}), "url") is None
    assert url_hash("a/b.txt", "{}", "url") is None
    assert url_hash("http://x.org/p/", "{}", "url") == url_hash("https://x.org/p", "{}", "url")
