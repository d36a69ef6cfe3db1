"""Measures M(y', y) of a translation against its reference, by name or of the user's own.

The same object scores single sentences, for the expectation that a teacher climbs, and whole sets,
for what is reported of dev and test, and both see text as
:class:`~l2t_fairseq.corpora.text_form.TextForm` makes it. All but the smoothing of a sentence's
BLEU is sacreBLEU's own default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from sacrebleu.metrics import BLEU, CHRF, TER

from l2t_core.errors import UserError, suggestion
from l2t_core.registry import Registry
from l2t_core.user_code import FAILURES, imported, is_import_path, source_of

# The reference's n-grams are counted once for all candidates and all episodes.
_REFERENCES = 4096
LIKELIHOOD = "log_likelihood"
EXPECTED = "expected_"

# From a reference to the function that scores hypotheses against it.
Against = Callable[[str], Callable[[str], float]]
# From hypotheses and references to a score out of 100 and its signature.
Judge = Callable[[Sequence[str], Sequence[str]], tuple[float, str]]
_Value = TypeVar("_Value")


class Measure(Protocol):
    """A measure of translations, higher is better.

    ``name`` is what teacher training's log calls it, ``title`` what tables of scores do.
    """

    name: str
    title: str

    def scores(
        self, hypotheses: Sequence[Sequence[str]], references: Sequence[str]
    ) -> list[list[float]]:
        """Return the score of each of a reference's hypotheses, [B][n]."""

    def corpus(self, hypotheses: Sequence[str], references: Sequence[str]) -> float:
        """Return the score of a whole set, one hypothesis per reference; 1 is perfect."""

    def judge(self, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
        """Return 100 times :meth:`corpus`, and the signature that tells how it was made.

        Raises:
            UserError: if there is nothing to score.
        """


class _Measure:
    def __init__(self, name: str, title: str, against: Against, judge: Judge) -> None:
        self.name, self.title, self._judge = name, title, judge
        self._against = lru_cache(_REFERENCES)(against)

    def judge(self, hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
        if not references:
            raise UserError("the reference is empty: nothing to score; prepare the data again")
        return self._judge(hypotheses, references)

    def corpus(self, hypotheses: Sequence[str], references: Sequence[str]) -> float:
        return self.judge(hypotheses, references)[0] / 100.0

    def scores(
        self, hypotheses: Sequence[Sequence[str]], references: Sequence[str]
    ) -> list[list[float]]:
        return _each(self._against, hypotheses, references)


class CorpusBleu(_Measure):
    """BLEU of a set, in which a translation has no score of its own but adds to the set's sums.

    ``counted`` leads from a reference to the function that counts what a hypothesis adds. Where
    single sentences are scored, they are so by their smoothed BLEU.
    """

    def __init__(
        self, name: str, title: str, against: Against, judge: Judge,
        counted: Callable[[str], Callable[[str], list[float]]],
    ) -> None:
        super().__init__(name, title, against, judge)
        self._counted = lru_cache(_REFERENCES)(counted)

    def statistics(
        self, hypotheses: Sequence[Sequence[str]], references: Sequence[str]
    ) -> list[list[list[float]]]:
        """Return what each adds to :func:`l2t_core.students.measures.corpus_bleu`'s, [B][n][10]."""
        return _each(self._counted, hypotheses, references)


def _each(
    against: Callable[[str], Callable[[str], _Value]],
    hypotheses: Sequence[Sequence[str]], references: Sequence[str],
) -> list[list[_Value]]:
    found = []
    for of, reference in zip(hypotheses, references, strict=True):
        judged = against(reference)
        distinct = {text: judged(text) for text in dict.fromkeys(of)}
        found.append([distinct[text] for text in of])
    return found


def _by_sacrebleu(metric: Callable[..., Any], turned: Callable[[float], float]) -> Against:
    """Return sentence scores of a sacreBLEU metric; one that holds its references keeps counts."""

    def against(reference: str) -> Callable[[str], float]:
        prepared = metric(references=[[reference]])
        return lambda text: turned(float(prepared.corpus_score([text], None).score)) / 100.0

    return against


def _judged(metric: Callable[..., Any], turned: Callable[[float], float]) -> Judge:
    """Return the score of sets by a sacreBLEU metric."""

    def judge(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
        made = metric()
        score = float(made.corpus_score(list(hypotheses), [list(references)]).score)
        return turned(score), str(made.get_signature())

    return judge


def _as_it_is(score: float) -> float:
    return score


def _rest(score: float) -> float:
    return 100.0 - score


# From sacreBLEU's ``tokenize`` (``none`` for text that is tokenised already) to the measure.
MEASURES: Registry[Callable[[str], Measure]] = Registry("measure")


@MEASURES.register("bleu")
def bleu(tokenize: str) -> Measure:
    """BLEU in [0, 1]; of sentences with add-one smoothing on orders n >= 2 (Lin and Och 2004).

    sacreBLEU leaves unigrams unsmoothed. With the smoothing no order is ever empty, so
    ``effective_order`` changes nothing but a warning per sentence. The corpus's is unsmoothed.
    """

    return _Measure("bleu", "BLEU", *_bleu(tokenize))


@MEASURES.register("corpus_bleu")
def corpus_bleu(tokenize: str) -> Measure:
    """BLEU in [0, 1] of the set of translations, orders n >= 2 smoothed by one."""

    def counted(reference: str) -> Callable[[str], list[float]]:
        # Unsmoothed: sacreBLEU's counts are those of the smoothing else.
        prepared = BLEU(references=[[reference]], smooth_method="none", tokenize=tokenize)

        def of(text: str) -> list[float]:
            found = prepared.corpus_score([text], None)
            return [*found.counts, *found.totals, found.sys_len, found.ref_len]

        return of

    return CorpusBleu("bleu", "BLEU", *_bleu(tokenize), counted)


def _bleu(tokenize: str) -> tuple[Against, Judge]:
    def smoothed(**more: Any) -> Any:
        return BLEU(
            smooth_method="add-k", smooth_value=1, effective_order=True, tokenize=tokenize, **more
        )

    def plain() -> Any:
        # force: sacreBLEU warns of text that looks tokenised, and this may well be.
        return BLEU(tokenize=tokenize, force=tokenize == "none")

    return _by_sacrebleu(smoothed, _as_it_is), _judged(plain, _as_it_is)


def _plain(
    name: str, title: str, metric: Callable[..., Any], turned: Callable[[float], float]
) -> Measure:
    return _Measure(name, title, _by_sacrebleu(metric, turned), _judged(metric, turned))


@MEASURES.register("chrf")
def chrf(tokenize: str) -> Measure:
    """chrF2 in [0, 1]: character n-grams up to 6 (Popovic 2015)."""
    return _plain("chrf", "chrF2", CHRF, _as_it_is)


@MEASURES.register("chrf++")
def chrf_plus_plus(tokenize: str) -> Measure:
    """chrF2++ in [0, 1]: chrF2 with words and pairs of words (Popovic 2017)."""
    return _plain(
        "chrf++", "chrF2++", lambda **settings: CHRF(word_order=2, **settings), _as_it_is
    )


@MEASURES.register("ter")
def ter(tokenize: str) -> Measure:
    """1 - TER, so that higher is better (Snover et al. 2006).

    At most 1; negative where a hypothesis needs more edits than its reference has words.
    """
    return _plain("1-ter", "1-TER", TER, _rest)


def own_measure(path: str) -> Measure:
    """Return the measure of the user's function ``module:function`` of (hypothesis, reference).

    It returns a number in [0, 1], higher is better; a set's score is the mean over its sentences.

    Raises:
        UserError: if it cannot be imported; and later, if it fails or returns anything else.
    """
    function = imported(path, "nmt.measure")

    def score(hypothesis: str, reference: str) -> float:
        try:
            value = function(hypothesis, reference)
            number = float(value)
        except FAILURES as error:
            raise UserError(
                f"nmt.measure {path} fails on {hypothesis!r} against {reference!r} "
                f"({type(error).__name__}: {error}); it takes two texts and returns a number"
            ) from error
        if not 0.0 <= number <= 1.0:
            raise UserError(
                f"nmt.measure {path} returned {value!r} for {hypothesis!r} against "
                f"{reference!r}; it must return a number in [0, 1], higher is better"
            )
        return number

    def judge(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
        pairs = zip(hypotheses, references, strict=True)
        mean = math.fsum(score(h, r) for h, r in pairs) / len(references)
        return 100.0 * mean, f"mean:{path}"

    return _Measure(path, path, lambda reference: lambda text: score(text, reference), judge)


def measure_content(name: str) -> dict[str, str]:
    """Return the digest of the code behind a measure of the user's own, nothing for ours.

    Raises:
        UserError: if it cannot be imported.
    """
    if not is_import_path(name):
        return {}
    return {"code_sha256": hashlib.sha256(source_of(name, "nmt.measure")).hexdigest()}


def measure_names() -> list[str]:
    """Return the names that ``nmt.measure`` may have, import paths aside."""
    return [*(EXPECTED + name for name in MEASURES.names()), LIKELIHOOD]


def check_measure_name(name: str) -> None:
    """Refuse a name for ``nmt.measure`` that is neither known nor an import path.

    Raises:
        UserError: naming the nearest and listing all.
    """
    known = measure_names()
    if not is_import_path(name) and name not in known:
        raise UserError(
            f"nmt.measure is {name!r}{suggestion(name, known)} (known: {', '.join(known)}, "
            "or module:function of your own)"
        )


def build_measure(name: str, tokenize: str = "13a") -> Measure:
    """Return the measure behind ``nmt.measure``; a likelihood goes with BLEU on dev.

    Raises:
        UserError: if there is none of that name.
    """
    check_measure_name(name)
    if is_import_path(name):
        return own_measure(name)
    return MEASURES.get(name.removeprefix(EXPECTED) if name != LIKELIHOOD else "bleu")(tokenize)
