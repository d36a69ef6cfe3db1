"""What the expected measure of translations costs: its share of an episode of teacher training.

An episode of a recipe is run whole, with the measure (candidates, their text and scores, their
log-probabilities and the derivative) on a clock of its own. Other sources of candidates and other
measures are then read at the student's end and put in its place. The corpus is the demo's, made on
the spot, unless --data names another:

    taskset -c 1 python tests/benchmarks/sequence_measure.py --rounds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost import now

logging.disable(logging.INFO)
warnings.simplefilter("ignore")

from l2t_cli.recipe_reading.loading import Recipe, load_recipe  # noqa: E402
from l2t_core.errors import UserError  # noqa: E402
from l2t_core.hypergradients import readout  # noqa: E402
from l2t_core.hypergradients.engine import Engine, Episode  # noqa: E402
from l2t_core.hypergradients.ways import exact  # noqa: E402
from l2t_core.students.life import Life  # noqa: E402
from l2t_core.students.state import feature_count  # noqa: E402
from l2t_core.teachers.architectures import build_teacher  # noqa: E402
from l2t_fairseq.corpora.prepare import prepare_demo  # noqa: E402
from l2t_fairseq.measures.candidates import CANDIDATES  # noqa: E402
from l2t_fairseq.measures.sentence_scores import build_measure  # noqa: E402
from l2t_fairseq.students import nmt  # noqa: E402

# A setting that people use, for each source.
SOURCES: dict[str, dict[str, float]] = {
    "ancestral": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 10},
    "nucleus": {"top_p": 0.9},
    "beam": {},
}
MEASURES = ("expected_chrf", "expected_chrf++", "expected_ter")
PARTS = ("search", "texts", "scores", "log-probabilities")


class Clocks:
    """Seconds spent in functions that are watched, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, whose seconds count under ``name``."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + now() - began

        return watched


class Bench:
    """A recipe's student, its teacher and the clocks of its measure."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.clocks = recipe, Clocks()
        self.student = recipe.field.build_student(recipe.student)
        names = self.student.default_features
        classes = self.student.num_classes
        self.life = Life(self.student)
        engine = Engine(self.life, recipe.loss, recipe.training)
        self.episode = Episode(engine, names, recipe.training.seed, recipe.training.seed)
        features = feature_count(names, classes)
        self.teacher = build_teacher(recipe.teacher, recipe.loss, classes, features, 1)
        watch = self.clocks.watch
        nmt.candidate_log_probs = watch("log-probabilities", nmt.candidate_log_probs)
        readout.smoothed_measure = watch("measure", readout.smoothed_measure)
        self.student.text = watch("texts", self.student.text)
        self.student.true_measure = watch("dev measure", self.student.true_measure)
        self.choose(recipe.student.candidates, {}, recipe.student.measure)

    def choose(self, candidates: str, settings: dict[str, float], measure: str) -> None:
        """Let the student's measure be another one."""
        self.student.spec = dataclasses.replace(
            self.recipe.student, candidates=candidates, measure=measure, **settings
        )
        source, watch = CANDIDATES.get(candidates), self.clocks.watch
        draw = watch("search", source.draw)
        self.student.source = dataclasses.replace(source, draw=draw)
        built: Any = build_measure(measure, self.student.form.bleu_tokenize)
        built.scores = watch("scores", built.scores)
        self.student.measure = built

    def run(self) -> dict[str, float]:
        """Return the seconds of one episode and of its parts."""
        return self._timed("episode", lambda: exact(self.episode, self.teacher, lambda p, s: None))

    def read(self, seed: int) -> dict[str, float]:
        """Return the seconds of the measure at the student's end, and of its parts."""
        return self._timed("alone", lambda: readout.smoothed_measure(self.life, seed))

    def _timed(self, name: str, call: Callable[[], Any]) -> dict[str, float]:
        self.clocks.seconds.clear()
        self.clocks.watch(name, call)()
        found = dict(self.clocks.seconds)
        found["derivative"] = found["measure"] - sum(found[part] for part in PARTS)
        return found


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each entry."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Return the recipe's own shares, and a row for every other source and measure."""
    bench = Bench(recipe)
    bench.life.begin(recipe.training.seed)
    bench.read(0)  # what is loaded at the first call is no part of an episode
    episodes = [bench.run() for _ in range(rounds)]
    own = medians(episodes)
    share = statistics.median(e["measure"] / e["episode"] for e in episodes)
    rest = own["episode"] - own["measure"]
    rows = []
    spec = recipe.student
    others = [(name, settings, spec.measure) for name, settings in SOURCES.items()]
    others += [(spec.candidates, {}, name) for name in MEASURES]
    for candidates, settings, name in others:
        bench.choose(candidates, settings, name)
        found = medians([bench.read(seed) for seed in range(rounds)])
        rows.append({
            "candidates": candidates, "settings": settings, "measure": name,
            "seconds": found["alone"], "share": found["alone"] / (rest + found["alone"]),
            **{part: found[part] for part in (*PARTS, "derivative")},
        })  # fmt: skip
    return {
        "recipe": recipe.short_name, "steps": spec.steps, "samples": spec.samples,
        "sources": min(spec.dev_sentences, len(bench.student.dev)), "rounds": rounds,
        "threads": torch.get_num_threads(), "episode_seconds": own["episode"],
        "measure_seconds": own["measure"], "share": share,
        "dev_measure_share": own["dev measure"] / own["episode"], "rows": rows,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print a table."""
    print(
        f"{found['recipe']}: {found['sources']} x {found['samples']} candidates after "
        f"{found['steps']} steps; episode {found['episode_seconds']:.1f} s, measure "
        f"{found['measure_seconds']:.2f} s: {found['share']:.1%} (dev measure "
        f"{found['dev_measure_share']:.1%})"
    )
    columns = (*PARTS, "derivative")
    print(f"{'candidates':>12} {'measure':>16} {'share':>6} {'seconds':>8} "
          + " ".join(f"{c:>{max(8, len(c))}}" for c in columns))  # fmt: skip
    for row in found["rows"]:
        print(f"{row['candidates']:>12} {row['measure']:>16} {row['share']:>6.1%} "
              f"{row['seconds']:>8.2f} "
              + " ".join(f"{row[c]:>{max(8, len(c))}.2f}" for c in columns))  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo-de-en")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--data", type=Path, help="a folder in place of the demo corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print a JSON line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        try:
            if args.rounds < 1:
                raise UserError(f"--rounds is {args.rounds}; it must be at least 1")
            data = args.data or Path(name) / "demo"
            recipe = load_recipe(args.recipe, [*args.overrides, f"nmt.data={data}"])
            if args.data is None:
                prepare_demo(data, None, lambda event: None)
            found = measure(recipe, args.rounds)
        except UserError as error:
            print(f"sequence_measure: {error}", file=sys.stderr)
            sys.exit(2)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
