"""E-mail addresses around an ``@``."""

from __future__ import annotations

import re

_COUNTRIES = """ac ad ae af ag ai al am ao ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn
bo br bs bt bw by bz ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec
ee eg er es et eu fi fj fk fm fo fr ga gb gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm
hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li
lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf
ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd
se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz
ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"""
_GENERIC = """academy aero agency ai app arpa art asia associates auto band bank bar bayern berlin
best bike biz black blog blue boutique build builders business cab cafe camp capital cards care
careers cash casino cat catering center chat church city cleaning clinic clothing cloud club coach
codes coffee college com community company computer construction consulting contractors cool coop
credit dance date dating deals degree delivery dental design dev digital direct directory doctor
dog domains earth edu education email energy engineer engineering enterprises equipment estate
events exchange expert express family fans farm fashion film finance financial fish fit fitness
florist fm football forsale foundation fun fund furniture fyi gallery games garden gift gives
glass global gmbh gold golf gov graphics green group guide guru hamburg haus health help hockey
holdings holiday homes horse hospital host hosting house icu immo inc industries info ink
institute insure int international investments jetzt jobs kim kitchen koeln land law lawyer lease
legal life lighting limited link live loan london love ltd management market marketing mba media
memorial men mil mobi moda money museum music name net network news ngo ninja nrw nyc one online
onl org page paris partners parts party pet pharmacy photo photography photos pics pictures pink
pizza place plumbing plus poker post press pro productions properties pub quebec realty recipes
red rehab rent rentals repair report republican rest restaurant review reviews rocks run sale
salon school science scot services shoes shop show singles site ski social software solar
solutions space store stream studio study style supplies supply support surf surgery swiss systems
tattoo tax taxi team tech technology tel tennis tips tires tirol today tokyo tools top tours town
toys trade training travel university vacations ventures vet video villas vin vip vision vote
voyage watch webcam website wedding wien wiki win wine work works world wtf xxx xyz yoga zone"""
TOP_LEVEL = frozenset(f"{_COUNTRIES} {_GENERIC}".split())
"""Top-level domains of people's addresses: countries, and those in common use (a selection)."""

_LOCAL = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-'" + bytes(
    [*range(0x80, 0xC0), *range(0xC3, 0xD5)]  # letters of two bytes: Latin, Greek, Cyrillic
)
_CONTINUATION = bytes(range(0x80, 0xC0))
_LABEL = rb"(?:[A-Za-z0-9]|[\xc3-\xd4][\x80-\xbf])(?:[A-Za-z0-9\-]|[\xc3-\xd4][\x80-\xbf]){0,62}"
_DOMAIN = re.compile(rb"(?:" + _LABEL + rb"\.)+([A-Za-z]{2,24})(?![\w\-@(\[]|\.[A-Za-z0-9])")
_RESERVED = re.compile(
    rb"(?i)(?:.*\.)?(?:example\.(?:com|org|net|edu)|(?:[^.]+\.)*(?:example|test|invalid|localhost|"
    rb"local)|users\.noreply\.github\.com)"
)
_SERVICE_USERS = frozenset((b"git", b"hg", b"svn"))
_IMAGE_SCALE = re.compile(rb"\d(?:\.\d)?x\.")


def find_email(view: memoryview, at: int) -> tuple[int, int] | None:
    """Find the address around the ``@`` at ``at``.

    Domains that are reserved for documentation (RFC 2606), logins of version control, decorators,
    versions of packages and products of matrices are none.
    """
    segment = bytes(view[max(0, at - 64) : at])
    local = segment[len(segment.rstrip(_LOCAL)) :].lstrip(_CONTINUATION + b"._%+-'")
    if not local or local.endswith(b".") or b".." in local or local in _SERVICE_USERS:
        return None
    match = _DOMAIN.match(view, at + 1, min(len(view), at + 256))
    if match is None or match[1].decode().lower() not in TOP_LEVEL:
        return None
    if _RESERVED.fullmatch(match[0]) or _IMAGE_SCALE.match(match[0]):
        return None
    return at - len(local), match.end()
