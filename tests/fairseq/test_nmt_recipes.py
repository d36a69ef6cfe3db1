"""Every translation recipe: what it describes, and that it runs, on small data of each form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from iwslt_files import official_files, pack
from toy_fairseq import run_module, toy_corpus

pytest.importorskip("fairseq")

from l2t_cli.comparing.command import load_for_comparison
from l2t_cli.comparing.fairseq import FairseqTrials
from l2t_cli.comparing.trials import Trial
from l2t_cli.main import main
from l2t_cli.recipe_reading.files import shipped_recipes
from l2t_cli.recipe_reading.loading import load_recipe
from l2t_fairseq.corpora import iwslt14
from l2t_fairseq.students.setup import FairseqSetup, parse_flags

RECIPES = [name for name in shipped_recipes() if name.startswith("nmt/")]
SMALL = {
    "lstm": " ".join(
        f"--{side}-{size} 16"
        for side in ("encoder", "decoder")
        for size in ("embed-dim", "hidden-size")
    )
    + " --decoder-out-embed-dim 16",
    "transformer": " ".join(
        f"--{side}-{size}"
        for side in ("encoder", "decoder")
        for size in ("layers 1", "embed-dim 16", "ffn-embed-dim 16", "attention-heads 2")
    ),
}
FEW = [
    "nmt.steps=4", "nmt.dev_interval=2", "nmt.dev_sentences=12", "nmt.samples=8",
    "nmt.true_measure_sentences=4",
]  # fmt: skip
SHORT = ["loss.warmup_steps=1", "training.episodes=1"]


@pytest.fixture(scope="module")
def folders(
    prepared_toy: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return small data for each recipe's first word: prepared folders and a data-bin."""
    place = tmp_path_factory.mktemp("data")
    archive = pack(official_files(pairs=250), place / "de-en.tgz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iwslt14, "MERGES", 6)  # or no word of so small a text would be cut
        iwslt14.prepare(place / "iwslt14", archive, lambda event: None)
    for split, (german, english) in toy_corpus().items():
        for language, lines in (("de", german), ("en", english)):
            cut = [" ".join(f"{w[:2]}@@ {w[2:]}" for w in line.split()) for line in lines]
            (place / f"{split}.{language}").write_text("\n".join(cut) + "\n", encoding="utf-8")
    flags = ["--source-lang", "en", "--target-lang", "de", "--joined-dictionary"]
    flags += ["--destdir", str(place / "wmt")]
    flags += [x for s in ("train", "valid", "test") for x in (f"--{s}pref", str(place / s))]
    result = run_module("fairseq_cli.preprocess", flags)
    assert result.returncode == 0, result.stderr
    return {
        "demo": prepared_toy,
        "multi30k": prepared_toy,
        "iwslt14": place / "iwslt14",
        "wmt": place / "wmt",
    }


@pytest.fixture
def l2t(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return ``l2t("recipes", "ls")``, which runs in a folder of its own and gives its output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        assert exit_.value.code == 0, streams.err
        return streams.out

    return run


def data_of(name: str, folders: dict[str, Path]) -> str:
    return f"nmt.data={folders[name.split('/')[1].split('-')[0]]}"


def write_start(name: str, folders: dict[str, Path], teach: str = "") -> None:
    """Write the checkpoint that a recipe's student starts from, if it starts from one."""
    flags = load_recipe(name).student.train
    if found := re.search(r"--finetune-from-model (\S+)", flags):
        data = Path(data_of(name, folders).removeprefix("nmt.data="))
        setup = FairseqSetup(data / "data-bin", f"{flags.replace(found.group(), '')} {teach}")
        start = Path(found.group(1))
        start.parent.mkdir(parents=True)
        model = setup.build_model(1).state_dict()
        torch.save({"model": model, "cfg": {"model": {"_name": "transformer"}}}, start)


def kind_of(name: str) -> str:
    return "lstm" if "lstm" in name else "transformer"


@pytest.mark.parametrize("name", RECIPES)
def test_it_validates_and_would_run_and_compare(
    name: str, folders: dict[str, Path], l2t: Callable[..., str]
) -> None:
    assert l2t("recipes", "validate", name) == f"{name}: ok\n"
    recipe = load_recipe(name)
    assert recipe.compare.losses[:2] == ["cross_entropy", "label_smoothing"]
    assert len(recipe.compare.lr) >= 3
    data = data_of(name, folders)
    write_start(name, folders)
    plan = l2t("train-teacher", name, data, "--dry-run").splitlines()
    assert any(line.startswith("trajectory: ") for line in plan)
    points = len(recipe.compare.label_smoothing.eps) * len(recipe.compare.lr)
    assert points <= recipe.compare.trials  # the grid is tried as a whole
    trials = len(recipe.compare.losses) * (recipe.compare.trials + recipe.compare.seeds)
    assert f"plan: {trials} trials" in l2t("compare", name, data, "--dry-run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("iwslt14-de-en-lstm1", {"encoder_layers": 1, "decoder_layers": 1}),
        ("iwslt14-de-en-lstm1", {"encoder_embed_dim": 256, "decoder_hidden_size": 256}),
        ("iwslt14-de-en-lstm2", {"encoder_layers": 2, "decoder_layers": 2}),
        ("iwslt14-de-en-lstm2", {"encoder_embed_dim": 512, "decoder_hidden_size": 512}),
        ("multi30k-de-en-lstm1", {"encoder_layers": 1, "decoder_hidden_size": 256}),
        ("iwslt14-de-en-transformer", {"encoder_ffn_embed_dim": 1024, "dropout": 0.3}),
        ("iwslt14-de-en-transformer", {"encoder_attention_heads": 4, "decoder_layers": 6}),
        ("wmt-en-de-transformer", {"encoder_ffn_embed_dim": 2048, "dropout": 0.1}),
        ("wmt-en-de-transformer", {"encoder_attention_heads": 8, "decoder_layers": 6}),
    ],
)
def test_models_are_of_the_size_that_they_are_known_by(
    name: str, expected: dict[str, float], folders: dict[str, Path]
) -> None:
    recipe = load_recipe(name)
    config = parse_flags(folders["wmt"], recipe.student.train)
    assert {key: getattr(config.model, key) for key in expected} == expected
    if "lstm" in name:
        assert str(config.model.decoder_attention) == "1"


@pytest.mark.parametrize("name", RECIPES)
def test_a_teacher_is_trained_on_a_small_student(
    name: str, folders: dict[str, Path], l2t: Callable[..., str]
) -> None:
    teach = f"{SMALL[kind_of(name)]} --max-tokens 300 --warmup-updates 2"
    write_start(name, folders, teach)
    # What a toy student says first matches no reference of the sentencepiece corpora.
    measure = [] if "iwslt" in name else ["nmt.measure=log_likelihood"]
    changes = [data_of(name, folders), *FEW, *SHORT, *measure, f"nmt.teach={teach}"]
    l2t("train-teacher", name, *changes, "--out", "run")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    episodes = [row for row in rows if row.get("event") == "episode"]
    assert len(episodes) == 2
    assert all(math.isfinite(row["dev_measure"]) for row in episodes)
    assert episodes[0]["hypergradient_norm"] > 0
    assert Path("run/teacher_best.safetensors").is_file()


def test_flags_of_teaching_come_last_and_stay_there(folders: dict[str, Path]) -> None:
    from l2t_fairseq.students.nmt import build_student

    data = data_of("nmt/iwslt14", folders)
    changes = [data, *FEW, f"nmt.teach={SMALL['lstm']} --lr 0.5 --warmup-updates 2"]
    recipe = load_recipe("iwslt14-de-en-lstm1", changes)
    student = build_student(recipe.student)
    student.reset(1)
    assert student.learning_rate(2) == pytest.approx(0.5)
    assert sum(p.numel() for p in student.module.parameters()) < 20_000
    command = FairseqTrials(load_for_comparison("iwslt14-de-en-lstm1", changes)).application
    assert "0.5" not in command.command.arguments


def test_taught_and_scored_on_tokenised_text(
    folders: dict[str, Path], l2t: Callable[..., str]
) -> None:
    """IWSLT from teacher to score: BLEU of tokenised text, as the papers have it."""
    from sacrebleu.metrics import BLEU

    from l2t_fairseq.corpora.prepare import read_lines

    name, data = "iwslt14-de-en-lstm1", data_of("nmt/iwslt14", folders)
    train = load_recipe(name).student.train + f" {SMALL['lstm']} --max-update 8 --cpu"
    changes = [data, *FEW, f"nmt.train={train}", "nmt.teach=", "nmt.generate=--beam 2 --cpu"]
    l2t("train-teacher", name, *changes, *SHORT, "--out", "run")
    l2t("apply-teacher", "run/teacher_best.safetensors", name, *changes, "--out", "applied")
    result = json.loads(Path("applied/result.json").read_text())
    assert "tok:none" in result["signature"] and "ref:" not in result["signature"]
    hypotheses = read_lines(Path("applied/taught/seed-1/test.hyp.en"))
    references = read_lines(folders["iwslt14"] / "raw" / "test.en")
    assert len(hypotheses) == len(references) == 20
    assert not any("@@" in line for line in hypotheses)
    assert result["scores"]["taught"][0]["value"] == pytest.approx(
        BLEU(tokenize="none", force=True).corpus_score(hypotheses, [references]).score
    )


def test_a_trial_on_data_that_the_user_binarised(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    name, data = "wmt-en-de-transformer", data_of("nmt/wmt", folders)
    train = load_recipe(name).student.train
    train += f" {SMALL['transformer']} --max-update 4 --update-freq 1 --cpu"
    train += " --save-interval-updates 2"
    changes = [data, f"nmt.train={train}", "nmt.generate=--beam 2 --cpu --max-len-b 8"]
    trials = FairseqTrials(load_for_comparison(name, changes))
    trials.check([], ["label_smoothing"])
    final = Trial(
        "label_smoothing", "label_smoothing", (("eps", 0.1),), None, "", 0.01, 7, final=True
    )
    result = trials.run(final, tmp_path / "trial")
    assert result.steps == 4 and result.dev is not None and result.test is not None
    assert "tok:none" in result.signature and result.signature.endswith("|ref:data-bin")
    hypotheses = (tmp_path / "trial" / "test.hyp.de").read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == len(toy_corpus()["test"][0])
    before = trials.identity()["content"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folders["wmt"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "test.en-de.de.idx").write_bytes((copy / "valid.en-de.de.idx").read_bytes())
    other = FairseqTrials(load_for_comparison(name, [*changes, f"nmt.data={copy}"]))
    assert other.identity()["content"] != before
