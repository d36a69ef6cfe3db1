"""What a teacher costs in fairseq: words per second and peak memory beside label smoothing.

Both criteria drive fairseq's own trainer on the same model and the same batches, in rounds that
take turns, so that a machine that slows down slows both. Prints one row per vocabulary:

    python tests/benchmarks/fairseq_cost.py --vocabulary 4000 10000 40000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from cost import now, peak_mib

logging.disable(logging.INFO)
warnings.simplefilter("ignore")

import l2t_fairseq  # noqa: E402
from l2t_core.specs import LossSpec, TeacherSpec  # noqa: E402
from l2t_core.students.state import NMT_FEATURES, feature_count  # noqa: E402
from l2t_core.teachers.architectures import build_teacher  # noqa: E402
from l2t_core.teachers.file import TeacherHeader, save_teacher  # noqa: E402

l2t_fairseq.register()

from fairseq import options, tasks  # noqa: E402
from fairseq.data import Dictionary, LanguagePairDataset  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

from l2t_fairseq.fingerprint import dictionary_fingerprint  # noqa: E402

BASELINE, TAUGHT = "label_smoothed_cross_entropy", "l2t_dynamic"
SENTENCE = 25  # tokens, as in spoken-language corpora after subword segmentation


class Side:
    """One criterion in fairseq's trainer, and the batches that both sides see."""

    def __init__(self, folder: Path, criterion: list[str], args: argparse.Namespace) -> None:
        metrics.reset()
        device = [] if torch.cuda.is_available() else ["--cpu"]
        flags = [
            str(folder), "--source-lang", "de", "--target-lang", "en", "--task", "l2t_translation",
            "--arch", args.arch, "--share-decoder-input-output-embed", "--optimizer", "adam",
            "--lr", "0.0005", "--clip-norm", "1.0", "--max-tokens", str(args.tokens),
            "--max-update", "1000", "--seed", "1", *device, *args.model_flags.split(), *criterion,
        ]  # fmt: skip
        parser = options.get_training_parser()
        config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, flags))
        self.task: Any = tasks.setup_task(config.task)
        torch.manual_seed(1)
        model = self.task.build_model(config.model)
        built = self.task.build_criterion(config.criterion)
        self.trainer = Trainer(config, self.task, model, built)
        self.batches = make_batches(self.task, args)
        self.words = sum(int(batch["ntokens"]) for batch in self.batches)

    def round(self) -> float:
        """Make one update per batch and return target words per second."""
        begin = now()
        with metrics.aggregate("train"):
            for batch in self.batches:
                self.trainer.train_step([batch])
        return self.words / (now() - begin)


def make_batches(task: Any, args: argparse.Namespace) -> list[Any]:
    """Return ``args.steps`` batches of random sentences, the same for every caller."""
    generator = torch.Generator().manual_seed(5)
    dictionary = task.target_dictionary
    lengths = torch.randint(
        SENTENCE - 5, SENTENCE + 6, (args.steps * max(1, args.tokens // (SENTENCE + 5)),),
        generator=generator,
    )  # fmt: skip

    def sentence(length: int) -> torch.Tensor:
        words = torch.randint(4, len(dictionary), (length,), generator=generator)
        return torch.cat([words, torch.tensor([dictionary.eos()])])

    sides = [[sentence(length) for length in lengths.tolist()] for _ in range(2)]
    sizes = [[len(s) for s in side] for side in sides]
    data = LanguagePairDataset(
        sides[0], sizes[0], task.source_dictionary, sides[1], sizes[1], dictionary
    )
    count = len(lengths) // args.steps
    return [
        data.collater([data[i] for i in range(step * count, (step + 1) * count)])
        for step in range(args.steps)
    ]


def write_folder(folder: Path, vocabulary: int, args: argparse.Namespace) -> dict[str, list[str]]:
    """Write dictionaries and a teacher; return each criterion's flags."""
    dictionary = Dictionary()
    for number in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    for language in ("de", "en"):
        dictionary.save(str(folder / f"dict.{language}.txt"))
    for language in ("de", "en"):  # what the task looks for to learn the languages' names
        (folder / f"train.de-en.{language}.idx").touch()
    loss = LossSpec(form=args.form, sigma="softplus", rank=args.rank)
    spec = TeacherSpec(features=list(NMT_FEATURES))
    features = feature_count(NMT_FEATURES, vocabulary)
    teacher = build_teacher(spec, loss, vocabulary, features, seed=1)
    fingerprint = dictionary_fingerprint(Dictionary.load(str(folder / "dict.en.txt")))
    path = folder / "teacher.safetensors"
    save_teacher(path, teacher, TeacherHeader(spec, loss, vocabulary, 1000, 100, fingerprint))
    return {
        BASELINE: ["--criterion", BASELINE, "--label-smoothing", "0.1"],
        TAUGHT: ["--criterion", TAUGHT, "--l2t-teacher", str(path)],
    }


def peak_memory(folder: Path, criterion: list[str], args: argparse.Namespace) -> float:
    """Return the peak memory in MiB of a process that makes one round of updates."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (folder, criterion, args))


def _peak(folder: Path, criterion: list[str], args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    side = Side(folder, criterion, args)
    side.round()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib()


def measure(vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return medians of both criteria for one vocabulary."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        criteria = write_folder(folder, vocabulary, args)
        memory = {key: peak_memory(folder, flags, args) for key, flags in criteria.items()}
        sides = {key: Side(folder, flags, args) for key, flags in criteria.items()}
        speeds: dict[str, list[float]] = {key: [] for key in sides}
        for number in range(args.rounds + 1):
            order = list(sides) if number % 2 else list(reversed(sides))
            for key in order:
                speed = sides[key].round()
                if number:  # the first round warms up
                    speeds[key].append(speed)
    # Of neighbours in time, so that a change of the machine's speed cancels.
    ratios = [t / b for t, b in zip(speeds[TAUGHT], speeds[BASELINE], strict=True)]
    return {
        "vocabulary": vocabulary,
        "form": args.form,
        "wps": {key: statistics.median(values) for key, values in speeds.items()},
        "wps_ratio": statistics.median(ratios),
        "peak_mib": memory,
        "peak_ratio": memory[TAUGHT] / memory[BASELINE],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[4000, 10000, 40000])
    parser.add_argument("--form", default="diagonal", help="loss.form")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="updates in a round")
    parser.add_argument("--tokens", type=int, default=1000, help="target tokens in a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arch", default="transformer_iwslt_de_en")
    parser.add_argument(
        "--model-flags",
        default="--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 256 "
        "--decoder-embed-dim 256 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.json:
        print(f"{'form':>8} {'V':>6} {'wps, smoothed':>14} {'wps, taught':>12} {'ratio':>6} "
              f"{'MiB, smoothed':>14} {'MiB, taught':>12} {'ratio':>6}")  # fmt: skip
    for vocabulary in args.vocabulary:
        found = measure(vocabulary, args)
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        wps, mib = found["wps"], found["peak_mib"]
        print(f"{args.form:>8} {vocabulary:>6} {wps[BASELINE]:>14.0f} {wps[TAUGHT]:>12.0f} "
              f"{found['wps_ratio']:>6.3f} {mib[BASELINE]:>14.0f} {mib[TAUGHT]:>12.0f} "
              f"{found['peak_ratio']:>6.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
