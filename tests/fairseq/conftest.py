"""A toy parallel corpus, preprocessed by fairseq, and a way to run fairseq's commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_fairseq import run_module, toy_corpus
from toy_runs import Runs, train_all


@pytest.fixture(scope="session")
def prepared_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared data folder (raw text, sentencepiece, data-bin) of the toy corpus."""
    pytest.importorskip("fairseq")
    from l2t_fairseq.corpora.prepare import prepare_corpus

    folder = tmp_path_factory.mktemp("prepared") / "toy"
    prepare_corpus(toy_corpus(), folder, name="toy", vocabulary_size=32)
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fairseq data-bin folder of a toy German-English corpus."""
    pytest.importorskip("fairseq")
    folder = tmp_path_factory.mktemp("toy")
    for split, sides in toy_corpus().items():
        for language, lines in zip(("de", "en"), sides, strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = run_module(
        "fairseq_cli.preprocess",
        [
            "--source-lang",
            "de",
            "--target-lang",
            "en",
            "--destdir",
            str(folder / "data-bin"),
            "--joined-dictionary",
            *(x for s in ("train", "valid", "test") for x in (f"--{s}pref", str(folder / s))),
        ],
    )
    assert result.returncode == 0, result.stderr
    return folder / "data-bin"


@pytest.fixture(scope="session")
def write_teacher() -> Callable[..., Path]:
    """Return a function that writes a teacher file for the dictionary of a data-bin folder."""
    pytest.importorskip("fairseq")
    import torch

    from l2t_core.specs import LossSpec, TeacherSpec
    from l2t_core.students.state import NMT_FEATURES
    from l2t_core.teachers.architectures import build_teacher
    from l2t_core.teachers.file import TeacherHeader, save_teacher
    from l2t_fairseq.fingerprint import data_fingerprint

    def write(
        path: Path,
        data: Path,
        *,
        form: str = "dense",
        sigma: str = "identity",
        neutral: bool = False,
        warmup_steps: int = 0,
        total_steps: int = 10,
        dev_interval: int = 2,
    ) -> Path:
        fingerprint = data_fingerprint(data, "en")
        size = int(fingerprint["num_classes"])
        loss = LossSpec(form=form, sigma=sigma, warmup_steps=warmup_steps)
        features = list(NMT_FEATURES)
        # With a memory, so that all that goes on after a stop, or in two processes, has one.
        name, scale = ("static", 0.0) if neutral else ("lstm", 0.3)
        spec = TeacherSpec(name=name, slots=3, init_scale=scale, features=features)
        teacher = build_teacher(spec, loss, size, len(features), seed=11)
        if not neutral:
            with torch.no_grad():  # attend sharply, so that phi_t really follows s_t
                teacher.weight_keys.mul_(8.0)
                teacher.bias_keys.mul_(8.0)
        header = TeacherHeader(spec, loss, size, total_steps, dev_interval, fingerprint)
        save_teacher(path, teacher, header)
        return path

    return write


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory, toy_data: Path, write_teacher: Callable[..., Path]
) -> Runs:
    """Return the students that several test files look at."""
    return train_all(tmp_path_factory.mktemp("runs"), toy_data, write_teacher)
