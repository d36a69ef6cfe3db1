"""A German-English corpus made on the spot: dates, times, numbers, units and money.

The texts are those that people write: patterns and names come from CLDR through Babel, numbers in
words from num2words. Both sides of a pair are the same value formatted in two locales, so every
pair says the same thing twice, and the corpus depends on the seed and those libraries alone.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from typing import Any

from babel import dates, lists, numbers, units
from num2words import num2words

Pair = tuple[str, str]
LOCALES = ("de", "en")

_UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-mile", "mass-kilogram",
    "mass-gram", "mass-ton", "volume-liter", "duration-hour", "duration-minute",
    "duration-second", "duration-day", "duration-week", "duration-month", "duration-year",
    "temperature-celsius", "speed-kilometer-per-hour", "area-square-meter",
    "area-square-kilometer", "energy-kilowatt-hour", "digital-gigabyte", "digital-megabyte",
)
_CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY", "SEK", "CAD", "PLN")
_SKELETONS = ("yMMMMd", "yMMMEd", "MMMMd", "MMMEd", "yMMMM", "yQQQQ", "MMMMEEEEd")


def _clean(text: str) -> str:
    """Return ``text`` with CLDR's non-breaking and thin spaces as plain ones."""
    return " ".join(text.split())


def _both(render: Callable[[str], str]) -> Pair:
    german, english = (_clean(render(locale)) for locale in LOCALES)
    return german, english


def _moment(rng: random.Random) -> datetime.datetime:
    start = datetime.datetime(1950, 1, 1)
    minutes = rng.randrange(100 * 365 * 24 * 60)
    return start + datetime.timedelta(minutes=minutes)


def _date(rng: random.Random) -> Pair:
    day = _moment(rng).date()
    if rng.random() < 0.5:
        style: Any = rng.choice(("full", "full", "long", "medium", "short"))
        return _both(lambda locale: dates.format_date(day, style, locale=locale))
    skeleton = rng.choice(_SKELETONS)
    return _both(lambda locale: dates.format_skeleton(skeleton, day, locale=locale))


def _date_time(rng: random.Random) -> Pair:
    moment = _moment(rng)
    style: Any = rng.choice(("full", "long", "medium"))

    def render(locale: str) -> str:
        # The full time style would add a time zone; people write the date long, the time short.
        pattern = dates.get_datetime_format(style, locale=locale)
        day = dates.format_date(moment, style, locale=locale)
        clock = dates.format_time(moment, "short", locale=locale)
        return str(pattern).replace("'", "").replace("{1}", day).replace("{0}", clock)

    return _both(render)


def _time(rng: random.Random) -> Pair:
    moment = _moment(rng)
    style: Any = rng.choice(("short", "medium"))
    return _both(lambda locale: dates.format_time(moment, style, locale=locale))


def _interval(rng: random.Random) -> Pair:
    begin = _moment(rng).date()
    end = begin + datetime.timedelta(days=rng.randrange(1, 60))
    skeleton = rng.choice(("yMMMd", "MMMd", "yMMMM", "yMMMEd"))
    return _both(lambda locale: dates.format_interval(begin, end, skeleton, locale=locale))


def _relative(rng: random.Random) -> Pair:
    unit = rng.choice((1, 60, 3600, 86400, 604800, 2629800, 31557600))
    delta = datetime.timedelta(seconds=unit * rng.randrange(1, 45) * rng.choice((-1, 1)))
    granularity: Any = rng.choice(("second", "minute", "hour", "day"))
    add = rng.random() < 0.7
    return _both(
        lambda locale: dates.format_timedelta(
            delta, granularity=granularity, threshold=1.2, add_direction=add, locale=locale
        )
    )


def _amount(rng: random.Random) -> float:
    """Return a number as people meet them: small ones often, large and broken ones sometimes."""
    size = rng.choice((10, 100, 100, 1000, 10_000, 1_000_000))
    return round(rng.random() * size, 2) if rng.random() < 0.3 else rng.randrange(1, size)


def _in_words(rng: random.Random) -> Pair:
    kind = rng.choice(("cardinal", "cardinal", "cardinal", "ordinal", "year"))
    value = rng.randrange(1100, 2100) if kind == "year" else int(_amount(rng)) + 1
    return _both(lambda locale: num2words(value, lang=locale, to=kind))


def _unit(rng: random.Random) -> Pair:
    value, unit = _amount(rng), rng.choice(_UNITS)
    length: Any = rng.choice(("long", "long", "short"))
    return _both(lambda locale: units.format_unit(value, unit, length, locale=locale))


def _money(rng: random.Random) -> Pair:
    value, currency = _amount(rng), rng.choice(_CURRENCIES)
    if rng.random() < 0.5:
        return _both(
            lambda locale: numbers.format_currency(
                value, currency, locale=locale, format_type="name"
            )
        )
    return _both(lambda locale: numbers.format_currency(value, currency, locale=locale))


def _money_in_words(rng: random.Random) -> Pair:
    value = rng.randrange(1, 2000)
    currency = rng.choice(_CURRENCIES[:4])

    def render(locale: str) -> str:
        name = numbers.get_currency_name(currency, count=value, locale=locale)
        return f"{num2words(value, lang=locale)} {name}"

    return _both(render)


def _percent(rng: random.Random) -> Pair:
    value = rng.randrange(1, 1000) / 1000
    return _both(
        lambda locale: numbers.format_percent(value, locale=locale, decimal_quantization=False)
    )


_SIMPLE = (
    _date, _date, _date_time, _date_time, _time, _interval, _relative, _in_words, _in_words,
    _unit, _unit, _money, _money, _money_in_words, _percent,
)


def _list(rng: random.Random) -> Pair:
    """Join two to four values of one kind, as CLDR's list patterns do."""
    kind = rng.choice((_unit, _money, _in_words, _date, _money_in_words, _time))
    style: Any = rng.choice(("standard", "standard", "or"))
    parts = [kind(rng) for _ in range(rng.randrange(2, 5))]
    german = lists.format_list([german for german, _ in parts], style, locale="de")
    english = lists.format_list([english for _, english in parts], style, locale="en")
    return _clean(german), _clean(english)


def _pair(rng: random.Random) -> Pair:
    return _list(rng) if rng.random() < 0.35 else rng.choice(_SIMPLE)(rng)


def make_demo_corpus(
    seed: int = 1, pairs: int = 20_000, held_out: int = 500
) -> dict[str, list[Pair]]:
    """Return ``train``, ``valid`` and ``test``, ``pairs`` (German, English) pairs in all.

    ``valid`` and ``test`` have ``held_out`` pairs each. No German sentence occurs twice, so
    nothing of valid or test is in train.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    unique: list[Pair] = []
    while len(unique) < pairs:
        german, english = _pair(rng)
        if german not in seen and 1 <= len(german.split()) <= 40:
            seen.add(german)
            unique.append((german, english))
    return {
        "train": unique[2 * held_out :],
        "valid": unique[:held_out],
        "test": unique[held_out : 2 * held_out],
    }
