"""A factual check without a language model: which medical entities and numbers an answer shares with its reference.

Entities are the embedded medical terms, the words of `lexicon.txt`, and words with a medical suffix (-itis, -ectomy,
-mycin ...). The longest one counts: "chest pain" is not "pain" too. An entity that stands up to three words after no,
not, never, without or cannot, in the same clause, is another claim: "not fever". Numbers count with their unit:
masses in mg, volumes in ml, ages and times, percentages, temperatures, pressures, rates ("1 in 5,000").

    precision  share of the answer's claims that the reference makes     recall  share of the reference's in the answer

What it cannot see: who does what to whom ("A causes B" equals "B causes A"); which drug a dose belongs to; a denial
worded otherwise ("rules out", "unlikely"); synonyms ("high blood pressure" and "hypertension", "kids" and "children");
words in neither list; claims without an entity or a number. A true statement that the reference leaves out lowers
precision. It finds candidates for a reader; it is no verdict on an answer.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from medlora.data.sources import TERMS

LEXICON = Path(__file__).with_name("lexicon.txt")
_SUFFIX = re.compile(
    r"(?:.{2,}(?:itis|osis|oses|emia|aemia|uria|algia|plegia|paresis|pathy|pathies|trophy|dystrophy|plasia|penia|"
    r"ectomy|otomy|ostomy|plasty|oscopy|graphy|gram|carcinoma|sarcoma|lymphoma|melanoma|blastoma|glioma|myeloma|adenoma|"
    r"leukemia|phobia|rrhea|rrhage|sclerosis|megaly|genesis|toxicity|"
    r"mycin|cillin|cycline|floxacin|azole|olol|pril|sartan|statin|prazole|dipine|zepam|zolam|oxetine|triptyline|vir|"
    r"mab|tinib|platin|caine|profen|parin|gliptin|gliflozin|glutide|thiazide|semide|terol|sone|solone))s?"
)
_NOT_MEDICAL = re.compile(
    r"(?:pro|dia|tele|insta|kilo|milli|micro)grams?|(?:photo|geo|demo|bio|biblio)graphy|(?:em|sym)pathy|genesis|"
    r"(?:dia|pro)gnos[ei]s"
)
_NEGATION = {"no", "not", "never", "without", "cannot", "n't", "nor"}
_CLAUSE = re.compile(r"[.;:,!?()\n]|\bbut\b")
_WORD = re.compile(r"n't|[a-z][a-z-]*(?:'s)?")
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SMALL = {word: str(n) for n, word in enumerate(_WORDS, 1)}
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_UNITS = {  # pattern: (name, factor to it)
    r"mcg|µg|μg|micrograms?": ("mg", 0.001), r"mg|milligrams?": ("mg", 1.0), r"g|grams?": ("mg", 1000.0),
    r"kg|kilograms?": ("kg", 1.0), r"pounds?|lbs?": ("pounds", 1.0), r"ml|milliliters?|cc": ("ml", 1.0),
    r"l|liters?|litres?": ("ml", 1000.0), r"iu|international units|units": ("units", 1.0),
    r"%|percent|per cent": ("%", 1.0),
    r"years?|yrs?": ("years", 1.0), r"months?": ("months", 1.0), r"weeks?": ("weeks", 1.0), r"days?": ("days", 1.0),
    r"hours?|hrs?": ("hours", 1.0), r"minutes?": ("minutes", 1.0), r"mm ?hg": ("mmHg", 1.0), r"mm": ("mm", 1.0),
    r"cm|centimeters?": ("cm", 1.0), r"inch(?:es)?": ("inches", 1.0), r"°? ?c": ("°C", 1.0), r"°? ?f": ("°F", 1.0),
    r"times (?:a|per) day|times daily": ("times a day", 1.0),
}  # fmt: skip
_QUANTITY = re.compile(
    rf"(?<![\w.])({_NUMBER})(?:\s*(?:-|–|to)\s*({_NUMBER}))?[\s-]*(?:"
    + "|".join(f"({pattern})" for pattern in _UNITS)
    + r")(?:/(kg|day|dl|ml|l|hour|min))?(?![\w%])"
)
_RATE = re.compile(rf"(?<![\w.])({_NUMBER}) (?:in|out of|per) ({_NUMBER})(?![\w%])")


def compare(answer: str, reference: str) -> dict[str, Any]:
    """{"precision", "recall" (None where a side makes no claim), "missing", "extra", "matched" (sorted lists)}."""
    said, known = claims(answer), claims(reference)
    both = said & known
    return {
        "precision": round(len(both) / len(said), 6) if said else None,
        "recall": round(len(both) / len(known), 6) if known else None,
        "missing": sorted(known - said),
        "extra": sorted(said - known),
        "matched": sorted(both),
    }


def claims(text: str) -> set[str]:
    """Every entity and quantity of a text, normalised, for example {"gout", "not fever", "500 mg", "1 in 5000"}."""
    text = text.lower().replace("’", "'").replace("n't", " n't")
    found = quantities(text)
    for clause in _CLAUSE.split(text):
        words = [word.removesuffix("'s") for word in _WORD.findall(clause)]
        found |= _entities(words)
    return found


def quantities(text: str) -> set[str]:
    """Numbers with their unit: "0.5 g" is "500 mg", "5 to 10 years" is "5-10 years", a bare number is none."""
    text = re.sub(rf"\b({'|'.join(_SMALL)})\b", lambda word: _SMALL[word[1]], text.lower())
    found = {f"{_plain(a)} in {_plain(b)}" for a, b in _RATE.findall(text)}
    for match in _QUANTITY.finditer(text):
        low, high, *units, per = match.groups()
        unit, factor = next(value for value, given in zip(_UNITS.values(), units, strict=True) if given)
        span = _plain(low, factor) + (f"-{_plain(high, factor)}" if high else "")
        found.add(f"{span} {unit}" + (f"/{per}" if per else ""))
    return found


def _plain(number: str, factor: float = 1.0) -> str:
    return f"{float(number.replace(',', '')) * factor:.10g}"


def _entities(words: list[str]) -> set[str]:
    lexicon, longest = _lexicon()
    found: set[str] = set()
    i = 0
    while i < len(words):
        name, length = next(
            (
                (name, n)
                for n in range(min(longest, len(words) - i), 0, -1)
                if (name := _known(words[i : i + n], lexicon))
            ),
            ("", 1),
        )
        if name:
            denied = _NEGATION & set(words[max(0, i - 3) : i])
            found.add(f"not {name}" if denied else name)
        i += length
    return found


def _known(words: list[str], lexicon: frozenset[str]) -> str:
    """The entity's singular name, or nothing."""
    phrase = " ".join(words)
    for name in (phrase, phrase.removesuffix("s"), phrase.removesuffix("es"), phrase.removesuffix("ies") + "y"):
        if name in lexicon:
            return name
    if len(words) == 1 and not _NOT_MEDICAL.fullmatch(phrase) and _SUFFIX.fullmatch(phrase):
        return phrase if phrase.endswith(("osis", "sis", "itis", "us", "ss")) else phrase.removesuffix("s")
    return ""


@lru_cache(maxsize=1)
def _lexicon() -> tuple[frozenset[str], int]:
    """(entities in lower case, words of the longest)."""
    lines = LEXICON.read_text(encoding="utf-8").splitlines()
    words = {w.strip() for line in lines if not line.startswith("#") for w in line.split(",")} - {""}
    terms = TERMS.read_text(encoding="utf-8").splitlines()
    names = words | {" ".join(_WORD.findall(json.loads(line)["term"].lower())) for line in terms}
    return frozenset(names - {""}), max(len(name.split()) for name in names)
