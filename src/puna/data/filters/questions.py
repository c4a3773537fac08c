"""Pages of questions and answers: the furniture of the site, greetings, thanks, edit notes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

from puna.data.filters.base import Finding, above, register
from puna.data.filters.batch import TextBatch
from puna.data.filters.cleaning import Cleaning, Cut, clean, of_lines

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_WHOM = r"(?: (?:all|everyone|everybody|guys|folks|there|community|experts|team|friends))*"
_THANKS = (
    r"(?:(?:many|big|kind) )?(?:thanks|thank you|thx|tia|cheers)(?: (?:you|so much|very much|a lot|"
    r"again|everyone|all|guys|folks|in advance|a bunch|for (?:(?:your|any|the|all) )*"
    r"(?:help|time|answers?|advice|suggestions?|reading|support|input|replies|reply)))*"
)
_CLOSED = re.compile(
    r"^\W*(?:closed as (?:duplicate|off.topic|not constructive|too localized|unclear|primarily)"
    r"|marked as duplicate by|this question (?:already has (?:an answer|answers) here"
    r"|is (?:closed|off.topic|not reproducible)|was (?:closed|caused by))"
    r"|closed\W+this question|this post is hidden)",
    re.IGNORECASE | re.MULTILINE,
)
_CUTS = {
    "votes": of_lines(
        r"(?:score:?\s*)?[-+]?\d+\s+(?:up ?|down ?)?votes?(?: (?:accepted|favorite).*)?"
        r"|score:\s*[-+]?\d+|votes?:\s*[-+]?\d+|[\d.,]+k?\s+(?:gold|silver|bronze) badges?"
        r"|viewed [\d.,]+k? times?|up ?vote|down ?vote"),
    "site": of_lines(
        r"(?:share|cite|edit|follow|flag|improve this (?:question|answer)|delete|close|reopen|\||·"
        r"|\s)*(?:share|follow|improve this (?:question|answer))(?:share|cite|edit|follow|flag|\||·"
        r"|improve this (?:question|answer)|\s)*"
        r"|add a comment|show \d+ more comments?|\d+ comments?|accepted answer|sort(?:ed)? by:?.*"
        r"|active\s+oldest\s+votes"),
    "dates": of_lines(
        rf"(?:asked|answered|edited|commented|modified|posted|protected)(?: by [\w.-]+)?,?(?: on)? "
        rf"(?:{_MONTH} \d{{1,2}}(?:,? '?\d{{2,4}})?|\d{{1,2}} {_MONTH} \d{{2,4}})"
        r"(?:,?(?: at)? \d{1,2}:\d{2}(?::\d{2})?)?"),
    "greetings": of_lines(
        rf"(?:hi|hello|hey|hiya|greetings|dear|good (?:morning|afternoon|evening|day)){_WHOM}"
        r"\s*[,.!:]*"),
    "edits": of_lines(
        r"\W{0,3}(?:edit(?:ed)?|update[d]?)\s*\d{0,2}\W{1,4}(?:fixed|corrected|added|removed|"
        r"formatted|reworded|typos?|spelling|grammar|formatting|title)\b[^.!?\n]{0,60}[.!]?\W{0,3}"),
    "thanks_lines": of_lines(rf"{_THANKS}(?:,? [\w.-]{{1,20}})?\s*[,.!:;()^-]*"),
    "thanks": Cut(re.compile(
        r"(?<=[.!?])[ \t]+(?:many |big )?(?:thanks|thank you|thx)(?: so much| very much| a lot)?"
        r" (?:in advance|for (?:your|any|the|all the) (?:help|time|answers?))[ \t]*[.!]*[ \t]*$",
        re.IGNORECASE | re.MULTILINE)),
    "signatures": Cut(re.compile(
        r"^[ \t]*(?i:(?:best|kind|warm|with) )*(?i:regards|best wishes|sincerely|yours truly)[,.!]?"
        r"[ \t]*(?:\n\s*[A-Z][\w.-]*(?: [A-Z][\w.-]*){0,2}[ \t]*$)?"
        r"|^-- ?\n(?:[^\n]+\n?){1,5}\Z",
        re.MULTILINE)),
}  # fmt: skip


@register("questions")
class Questions(Cleaning):
    """Cleans pages of questions and answers, drops those that were closed (rules ours).

    Rewrites what it keeps.
    """

    cuts: ClassVar[Mapping[str, Cut]] = _CUTS
    reasons: ClassVar[dict[str, str]] = {
        "questions.closed": "the page says that the question was closed or is a duplicate",
        "questions.votes": "lines of votes, scores, badges, views cut out (measured only)",
        "questions.site": 'lines such as "share improve this answer" cut out (measured only)',
        "questions.dates": 'lines such as "asked Mar 5 at 10:22" cut out (measured only)',
        "questions.greetings": "lines that only greet cut out (measured only)",
        "questions.edits": "short notes about edits cut out (measured only)",
        "questions.thanks_lines": "lines that only thank cut out (measured only)",
        "questions.thanks": "sentences of thanks at the end of a line cut out (measured only)",
        "questions.signatures": "signatures cut out (measured only)",
        "questions.emptied": "fewer characters than `min_left` are left of a text that was cut",
    }
    drop_closed: bool = True
    """Drop pages of questions that were closed."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Look for closed questions, then cut out, count, and look at what is left."""
        found = [len(_CLOSED.findall(text)) for text in docs.strings()]
        limit = 0 if self.drop_closed else float("inf")
        yield above("questions.closed", found, limit)
        yield from clean("questions", docs, _CUTS, self.off, self.min_left)
