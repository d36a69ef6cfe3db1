"""The demo corpus: reproducible, split cleanly, and the same thing said on both sides."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from babel import Locale
from checkout import LIMIT, ROOT  # type: ignore[import-not-found]

from l2t_fairseq.corpora.demo import Pair, make_demo_corpus

NUMBER = r"\d[\d.,]*\d|\d"


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[Pair]]:
    return make_demo_corpus()


@pytest.fixture(scope="module")
def pairs(corpus: dict[str, list[Pair]]) -> list[Pair]:
    return [pair for split in corpus.values() for pair in split]


def test_sizes_and_splits(corpus: dict[str, list[Pair]]) -> None:
    assert {split: len(pairs) for split, pairs in corpus.items()} == {
        "train": 19_000,
        "valid": 500,
        "test": 500,
    }
    sources = [german for pairs in corpus.values() for german, _ in pairs]
    assert len(set(sources)) == len(sources)


def test_the_seed_decides(corpus: dict[str, list[Pair]]) -> None:
    small = {seed: make_demo_corpus(seed, pairs=300, held_out=30) for seed in (1, 2)}
    assert make_demo_corpus(1, pairs=300, held_out=30) == small[1] != small[2]
    # A larger corpus of the same seed goes on where the smaller one ends.
    assert small[1]["valid"] == corpus["valid"][:30]


def test_neither_time_zone_nor_locale_nor_hash_seed_matters(
    corpus: dict[str, list[Pair]],
) -> None:
    code = (
        "import json; from l2t_fairseq.corpora.demo import make_demo_corpus; "
        "print(json.dumps(make_demo_corpus(pairs=2000, held_out=500)))"
    )
    setting = {"TZ": "Asia/Tokyo", "LC_ALL": "fr_FR.UTF-8", "PYTHONHASHSEED": "7"}
    path = {"PYTHONPATH": str(ROOT / "plugins")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **path, **setting},
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    elsewhere = json.loads(done.stdout)
    assert elsewhere["test"] == [list(pair) for pair in corpus["test"]]
    digests = [
        hashlib.sha256(json.dumps(part).encode()).hexdigest()
        for part in (elsewhere["train"], corpus["train"][:1000])
    ]
    assert digests[0] == digests[1]


def test_plain_text(pairs: list[Pair]) -> None:
    text = "".join(german + english for german, english in pairs)
    assert {c for c in text if c.isspace()} == {" "}
    assert all(c.isprintable() for c in set(text))
    assert all(side == " ".join(side.split()) != "" for pair in pairs for side in pair)
    assert max(len(german.split()) for german, _ in pairs) <= 20


def plain_number(text: str, decimal: str) -> float:
    thousands = "," if decimal == "." else "."
    return float(text.replace(thousands, "").replace(decimal, "."))


def test_amounts_are_the_same_on_both_sides(pairs: list[Pair]) -> None:
    """Numbers read by hand, German and English marks exchanged, must agree in order."""
    english_unit = r"(?:grams?|kilograms?|meters?|kilometers?|miles?|euros?|liters?|%)"
    german_amount = re.compile(rf"({NUMBER})(?:%| \S+(?: \S+)?)")
    english_amount = re.compile(rf"({NUMBER}) ?{english_unit}")
    checked = 0
    for german, english in pairs:
        right = english_amount.fullmatch(english)
        if right is None:
            continue
        left = german_amount.fullmatch(german)
        assert left, (german, english)
        assert plain_number(left[1], ",") == plain_number(right[1], "."), (german, english)
        checked += 1
    assert checked > 300


def test_long_dates_are_the_same_on_both_sides(pairs: list[Pair]) -> None:
    german_months = {name: n for n, name in Locale("de").months["format"]["wide"].items()}
    english_months = {name: n for n, name in Locale("en").months["format"]["wide"].items()}
    german_days = {name: n for n, name in Locale("de").days["format"]["wide"].items()}
    english_days = {name: n for n, name in Locale("en").days["format"]["wide"].items()}
    german_date = re.compile(r"(\w+), (\d+)\. (\w+) (\d{4})(?:, .*)?")
    english_date = re.compile(r"(\w+), (\w+) (\d+), (\d{4})(?:, .*)?")
    checked = 0
    for german, english in pairs:
        left = german_date.fullmatch(german)
        if left is None:
            continue
        right = english_date.fullmatch(english)
        assert right, (german, english)
        assert (german_days[left[1]], left[2], german_months[left[3]], left[4]) == (
            english_days[right[1]],
            right[3],
            english_months[right[2]],
            right[4],
        )
        checked += 1
    assert checked > 300


def test_times_are_the_same_on_both_sides(pairs: list[Pair]) -> None:
    """14:05 is 2:05 PM, in order, wherever times occur."""
    checked = 0
    for german, english in pairs:
        left = [(int(h), int(m)) for h, m in re.findall(r"\b(\d\d):(\d\d)(?::00)?\b", german)]
        right = [
            (int(h) % 12 + 12 * (half == "PM"), int(m))
            for h, m, half in re.findall(r"\b(\d{1,2}):(\d\d)(?::00)? (AM|PM)", english)
        ]
        assert left == right, (german, english)
        checked += len(left)
    assert checked > 3000


@pytest.mark.parametrize(
    ("german", "english"),
    [
        (r"\w+, \d+\. \w+ \d{4}, \d\d:\d\d", r"\w+, \w+ \d+, \d{4}, .* [AP]M"),
        (r"(vor|in) \d+ \w+", r"(\d+ \w+ ago|in \d+ \w+)"),
        (r".*(und|oder) .*Franken", r".*(and|or) .*francs"),
        (r"[a-zäöüß]+hundert[a-zäöüß]+", r"[a-z ,-]+hundred[a-z -]+"),
        (r"\d+,\d ?%", r"\d+\.\d%"),
    ],
)
def test_what_people_write_occurs(pairs: list[Pair], german: str, english: str) -> None:
    matching = [p for p in pairs if re.fullmatch(german, p[0]) and re.fullmatch(english, p[1])]
    assert len(matching) >= 50
