"""Rows that look as if they told who a patient is, found before anything learns them by heart.

These are the identifiers of HIPAA's Safe Harbor (45 CFR 164.514(b)(2)) that have a form of their own. A name without a
title, a place or a rare disease has none: what is not found here may still tell. And a telephone number or an address
may be a public office's; nobody can see that from its form.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from medlora.data.sources import Record

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}\.?"
_YEAR = r"(?:19|20)\d\d"
_STREETS = ("Street", "St", "Avenue", "Ave", "Road", "Rd", "Boulevard", "Blvd", "Lane", "Drive", "Court")
_NUMBERED = (
    r"\b(?:MRN|(?:medical record|patient|case|NHS|insurance|member|account|chart|hospital)"
    r"(?: (?:id|no|nr|number)\b\.?| ?(?=[:#=])))"
)
PATTERNS = {
    "e-mail address": (("@",), r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "telephone number": (
        (),
        r"(?<![\w.-])(?:\+?1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
        r"|(?<!\w)\+(?:\d[ .()-]{0,2}){8,14}\d(?!\w)",
    ),
    "social security number": ((), r"(?<![\w-])\d{3}-\d\d-\d{4}(?![\w-])"),
    "record number": ((), rf"(?i:{_NUMBERED})[:#= ]{{0,3}}[A-Z]{{0,4}}-?\d[\d -]{{3,}}"),
    "date": (
        (),
        rf"(?<![\w/.-])(?:\d{{1,2}}([/.-])\d{{1,2}}\1{_YEAR}|{_YEAR}-\d\d-\d\d)(?![\w/-])"
        rf"|\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? {_YEAR}\b|\b\d{{1,2}}(?:st|nd|rd|th)?\.? {_MONTH},? {_YEAR}\b",
    ),
    "age over 89": (("old", "aged"), r"\b(?:9\d|1[01]\d)[- ]years?[- ]old\b|\baged (?:9\d|1[01]\d)\b(?! ?%)"),
    "name": (
        ("Mr", "Ms", "Dr", "atient:", "ATIENT:", "ame:", "AME:"),
        r"\b(?:Mr|Mrs|Ms|Dr)\.? [A-Z][a-z]+\b|\b(?i:patient|name): ?[A-Z][a-z]+ [A-Z][a-z]+\b",
    ),
    "street address": (_STREETS, rf"\b\d{{1,5}} (?:[A-Z][a-z]+ ){{1,3}}(?:{'|'.join(_STREETS)})\b"),
}
"""{kind: (strings of which a text must have one to be searched; where there are none, it needs digits), pattern}."""
_COMPILED = {kind: (hints, re.compile(pattern)) for kind, (hints, pattern) in PATTERNS.items()}
_DIGITS = re.compile(r"\d{3}|\+\d")


@dataclass(frozen=True, slots=True)
class Found:
    """Rows with something that looks like an identifier."""

    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{where the row stands: the kinds found in it}."""

    @property
    def kinds(self) -> dict[str, int]:
        """How many rows have each kind, the most frequent first."""
        return dict(Counter(kind for kinds in self.rows.values() for kind in kinds).most_common())

    def describe(self) -> str:
        """How many, of which kinds, and where the first of them stand; never what stands there."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.items())
        places = ", ".join(list(self.rows)[:3]) + ", ..." * (len(self.rows) > 3)
        return f"rows that look as if they held identifiers: {len(self.rows):,} ({kinds}), at {places}"


def kinds_in(text: str) -> tuple[str, ...]:
    """Kinds of identifiers that the text seems to hold."""
    digits = _DIGITS.search(text) is not None
    return tuple(
        kind
        for kind, (hints, pattern) in _COMPILED.items()
        if (any(hint in text for hint in hints) if hints else digits) and pattern.search(text)
    )


def search(records: Sequence[Record]) -> Found:
    """Every row's text, questions and answers alike."""
    found = ((record.where, kinds_in(record.content)) for record in records)
    return Found({where: kinds for where, kinds in found if kinds})
