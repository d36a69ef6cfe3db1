"""The comparison of translation recipes: the commands built, one trial with the real fairseq."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from in_process import Run, write_teacher  # type: ignore[import-not-found]

pytest.importorskip("fairseq")

from l2t_cli.applying.fairseq import FairseqApplication
from l2t_cli.comparing.command import load_for_comparison
from l2t_cli.comparing.fairseq import FairseqTrials, _curve
from l2t_cli.comparing.trials import Trial, TrialStore
from l2t_cli.user_dir import plugin_folder
from l2t_core.errors import UserError
from l2t_fairseq.commands.train import FairseqCommand, value_of

RECIPE = """\
field: nmt
nmt:
  data: {data}
  train: >-
    --arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16
    --decoder-embed-dim 16 --encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16
    --encoder-attention-heads 2 --decoder-attention-heads 2 --optimizer adam --lr 0.01
    --max-tokens 400 --max-update 6 --num-workers 0 --cpu {more}
  generate: --beam 1 --max-len-a 0 --max-len-b 8
  steps: 12
  dev_interval: 4
compare: {{lr: [0.01, 0.02], trials: 2, seeds: 2, losses: [label_smoothing]}}
"""


def trials(tmp_path: Path, more: str = "", data: Path = Path("data/none")) -> FairseqTrials:
    path = tmp_path / "nmt.yaml"
    path.write_text(RECIPE.format(data=data, more=more))
    return FairseqTrials(load_for_comparison(str(path), []))


def trial(loss: str, teacher: Path | None = None, lr: float = 0.02, final: bool = False) -> Trial:
    own = {"label_smoothing": (("eps", 0.1),), "mrt": (("share", 0.5), ("samples", 3.0))}
    settings = own.get(loss, ())
    return Trial(loss, loss, settings, teacher, "", lr, 7, final)


def make_teacher(folder: Path) -> Path:
    return write_teacher(folder / "t.safetensors", 8, kind="dictionary", sha256="0")


def differences(a: FairseqCommand, b: FairseqCommand) -> set[str]:
    """Return the words that one of two commands has and the other has not."""
    return set(a.arguments) ^ set(b.arguments)


def test_commands_differ_in_the_loss_alone(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path)
    made = trials(tmp_path)
    plain = made.command(trial("cross_entropy"), tmp_path)
    smooth = made.command(trial("label_smoothing"), tmp_path)
    taught = made.command(trial("taught", teacher), tmp_path)
    assert value_of(plain, "--criterion") == "cross_entropy"
    assert value_of(smooth, "--criterion") == "label_smoothed_cross_entropy"
    assert value_of(smooth, "--label-smoothing") == "0.1"
    assert value_of(taught, "--criterion") == "l2t_dynamic"
    for command in (plain, smooth, taught):
        assert value_of(command, "--lr") == "0.02" and value_of(command, "--seed") == "7"
        assert value_of(command, "--save-dir") == str(tmp_path / "checkpoints")
        # 4 of 12 steps, in 6 updates: the same for all, whatever the teacher's own.
        assert value_of(command, "--validate-interval-updates") == "2"
        assert command.arguments.count("--lr") == 1
        # Whichever loss is killed goes on exactly.
        assert value_of(command, "--task") == "l2t_translation"
        assert value_of(command, "--user-dir") == str(plugin_folder())
    assert differences(plain, smooth) == {
        "cross_entropy", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
        "--report-accuracy", "loss", "nll_loss",
    }
    # The checkpoint is chosen by plain dev nll: plain cross-entropy calls it the loss.
    metrics = [value_of(c, "--best-checkpoint-metric") for c in (plain, smooth, taught)]
    assert metrics == ["loss", "nll_loss", "nll_loss"]


def test_minimum_risk_is_the_end_of_the_same_training(tmp_path: Path) -> None:
    made = trials(tmp_path)
    plain, risk = (made.command(trial(loss), tmp_path) for loss in ("cross_entropy", "mrt"))
    assert differences(plain, risk) == {
        "cross_entropy", "l2t_expected_measure", "--l2t-warmup-steps", "3", "--l2t-ce-mix", "0.5",
        "--l2t-samples", "--l2t-alpha", "--l2t-tokenizer", "none",
        "loss", "l2t_measure", "--maximize-best-checkpoint-metric",
    }
    assert value_of(risk, "--l2t-samples") == "3" and value_of(risk, "--max-update") == "6"
    assert value_of(risk, "--validate-interval-updates") == "2"
    # What the recipe names is kept, and chooses for every loss.
    bleu = trials(tmp_path, "--best-checkpoint-metric bleu --maximize-best-checkpoint-metric")
    risk = bleu.command(trial("mrt"), tmp_path)
    assert value_of(risk, "--best-checkpoint-metric") == "bleu"
    assert risk.arguments.count("--maximize-best-checkpoint-metric") == 1
    accuracy = trials(tmp_path, "--best-checkpoint-metric accuracy")
    risk = accuracy.command(trial("mrt"), tmp_path)
    assert value_of(risk, "--best-checkpoint-metric") == "l2t_accuracy"


def test_minimum_risk_scores_the_text_that_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "nmt.yaml"
    path.write_text(RECIPE.format(data="data/none", more=""))
    change = "nmt.generate=--beam 1 --tokenizer moses"
    made = FairseqTrials(load_for_comparison(str(path), [change]))
    assert value_of(made.command(trial("mrt"), tmp_path), "--l2t-tokenizer") == "moses"


def test_students_are_judged_by_what_the_teacher_climbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is minimum risk training; a likelihood is climbed, and BLEU is what counts."""
    monkeypatch.setattr(FairseqApplication, "content", lambda self: {})

    def made(measure: str) -> FairseqTrials:
        path = tmp_path / "nmt.yaml"
        path.write_text(RECIPE.format(data="data/none", more=""))
        return FairseqTrials(load_for_comparison(str(path), [f"nmt.measure={measure}"]))

    for measure, title in (("expected_chrf", "chrF2"), ("expected_ter", "1-TER")):
        judged = made(measure)
        assert (judged.measure, judged.dev_measure) == (title, title)
        assert judged.identity()["measure"] == measure
        risk = judged.command(trial("mrt"), tmp_path)
        assert value_of(risk, "--l2t-measure") == measure
    for measure in ("expected_bleu", "log_likelihood"):
        judged = made(measure)
        assert (judged.measure, judged.dev_measure) == ("BLEU", "BLEU")
        assert "measure" not in judged.identity()
        assert value_of(judged.command(trial("mrt"), tmp_path), "--l2t-measure") is None


def test_what_the_recipe_asks_for_is_kept(tmp_path: Path) -> None:
    made = trials(
        tmp_path,
        "--criterion label_smoothed_cross_entropy --label-smoothing 0.3 "
        "--best-checkpoint-metric accuracy --validate-interval-updates 3",
    )
    plain = made.command(trial("cross_entropy"), tmp_path)
    # Plain cross-entropy reports no accuracy; smoothing by nothing is the same loss.
    assert value_of(plain, "--label-smoothing") == "0"
    assert value_of(plain, "--best-checkpoint-metric") == "accuracy"
    assert value_of(plain, "--validate-interval-updates") == "3"
    taught = made.command(trial("taught", make_teacher(tmp_path)), tmp_path)
    assert value_of(taught, "--best-checkpoint-metric") == "l2t_accuracy"
    assert value_of(taught, "--validate-interval-updates") == "3"
    bleu = trials(tmp_path, "--best-checkpoint-metric bleu")
    assert value_of(bleu.command(trial("cross_entropy"), tmp_path), "--best-checkpoint-metric") == (
        "bleu"
    )


@pytest.mark.parametrize("key", ["train", "teach", "generate"])
def test_an_open_quote_is_found_without_data(l2t: Run, tmp_path: Path, key: str) -> None:
    path = tmp_path / "nmt.yaml"
    start = {"train": "--arch", "teach": "steps: 12", "generate": "--beam"}[key]
    changed = "steps: 12\n  teach: --lr '0.1" if key == "teach" else f"--x '0 {start}"
    path.write_text(RECIPE.format(data="data/none", more="").replace(start, changed))
    line = l2t("recipes", "validate", path).error()
    assert f"nmt.{key}: No closing quotation in the flags; close the quotes" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("compare.losses=[large_margin]", "large_margin does not exist for nmt recipes; remove it"),
        ("compare.losses=[label_smothing]", "did you mean 'label_smoothing'?"),
        ("compare.mrt.mix=[2]", "compare.mrt.mix is 2; it must be from 0 to 1"),
        ("compare.seeds=2", "no data folder data/none"),
    ],
)
def test_what_cannot_be_compared(l2t: Run, tmp_path: Path, change: str, expected: str) -> None:
    path = tmp_path / "nmt.yaml"
    path.write_text(RECIPE.format(data="data/none", more=""))
    assert expected in l2t("compare", path, change).error()
    assert not Path("runs").exists()


def test_the_recipes_own_rate_is_needed_only_where_the_grid_is_made_of_it(
    l2t: Run, tmp_path: Path
) -> None:
    made = trials(tmp_path, "--lr 0.01,0.02")
    assert value_of(made.command(trial("cross_entropy"), tmp_path), "--lr") == "0.02"
    with pytest.raises(UserError, match=r"one rate to start from, or compare\.lr"):
        _ = made.rate


@pytest.mark.parametrize(
    ("reason", "diverged"),
    [
        ("FloatingPointError: Minimum loss scale reached (0.0001)", True),
        ("FloatingPointError: gradients are Nan/Inf", True),
        ("ValueError: NaN detected in output of decoder", True),
        ("RuntimeError: out of memory", False),
    ],
)
def test_only_numbers_that_were_lost_are_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, diverged: bool
) -> None:
    """Whatever the folder is called in which the student is trained."""

    def failing(words: object, environment: object, log: Path, on_progress: object) -> None:
        log.write_text("")
        raise UserError(f"fairseq-train failed ({reason}); its full output is in {log}")

    monkeypatch.setattr("l2t_cli.applying.fairseq_process.run_logged", failing)
    made, place = trials(tmp_path), tmp_path / "Nancy" / "NaN"
    if diverged:
        assert made.run(trial("cross_entropy"), place).diverged
    else:
        with pytest.raises(UserError, match="out of memory"):
            made.run(trial("cross_entropy"), place)


def test_a_trial_that_another_flag_ended_tells_its_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(words: object, environment: object, log: Path, on_progress: object) -> None:
        log.write_text("x | INFO | train | epoch 002 | loss 6.5 | num_updates 4 | lr 0.1\n")

    monkeypatch.setattr("l2t_cli.applying.fairseq_process.run_logged", training)
    monkeypatch.setattr(FairseqTrials, "_score", lambda *_: (20.0, "nrefs:1"))
    made = trials(tmp_path, "--max-epoch 2")
    assert made.steps == 6 and made.run(trial("cross_entropy"), tmp_path / "run").steps == 4


def test_the_curve_is_read_from_every_log_format(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(
        "x | INFO | train_inner | epoch 001: 3 / 9 loss=9.1, nll_loss=9, num_updates=3, lr=0.1\n"
        "x | INFO | valid | epoch 001 | valid on 'valid' subset | loss 6.5 | nll_loss 6 | ppl 64"
        " | num_updates 4 | best_loss 6.5\n"
        "x | INFO | valid | epoch 002 | valid on 'valid' subset | loss 5 | ppl 32 | wps 9"
        " | num_updates 8 | best_loss 5\n"
        '{"epoch": 3, "valid_loss": "4.5", "valid_nll_loss": "4", "valid_num_updates": "12", '
        '"valid_best_loss": "4.5"}\n'
        "x | INFO | valid | valid on 'valid' subset | loss nan | num_updates 16\n"
        "x | INFO | valid | epoch 005 | valid on 'valid' subset | loss 2e-05 | num_updates 20\n"
    )
    ln2 = 0.6931471805599453
    assert _curve(log, "valid") == [[4, pytest.approx(6 * ln2)], [8, pytest.approx(5 * ln2)],
                           [12, pytest.approx(4 * ln2)], [20, pytest.approx(2e-5 * ln2)]]


@pytest.mark.parametrize("subsets", ["valid,test", "test,valid"])
def test_the_curve_is_of_the_first_subset_alone(tmp_path: Path, subsets: str) -> None:
    first, second = subsets.split(",")
    log = tmp_path / "train.log"
    with log.open("w") as handle:
        for updates, name, loss in ((4, first, 3), (4, second, 2)):
            handle.write(
                f"x | INFO | {name} | epoch 001 | valid on '{name}' subset | loss {loss} | ppl 9"
                f" | num_updates {updates}\n"
            )
            stats = {f"{name}_loss": f"{loss}.5", f"{name}_num_updates": "8"}
            handle.write(f"x | INFO | {name} | {json.dumps({'epoch': 2, **stats})}\n")
    ln2 = 0.6931471805599453
    assert _curve(log, first) == [[4, pytest.approx(3 * ln2)], [8, pytest.approx(3.5 * ln2)]]


def test_a_trial_with_the_real_fairseq(tmp_path: Path) -> None:
    from l2t_fairseq.corpora.prepare import prepare_corpus

    words = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four"}
    lines = [[a, b, c] for a in words for b in words for c in words]
    german = [" ".join(line) for line in lines]
    english = [" ".join(words[w] for w in line) for line in lines]
    corpus = {
        split: (german[i::4], english[i::4]) for i, split in enumerate(("train", "valid", "test"))
    }
    prepare_corpus(corpus, tmp_path / "data", name="tiny", vocabulary_size=24)
    made = trials(tmp_path, data=tmp_path / "data")
    made.check([], [])
    silent = trials(tmp_path, data=tmp_path / "data")
    silent.application.generate = "--beam 1 --quiet"
    with pytest.raises(UserError, match=r"with --quiet .* remove it from nmt\.generate"):
        silent.check([], [])
    store = TrialStore(tmp_path / "out", made.identity())
    final = trial("mrt", final=True)
    result = made.run(final, store.work(final))
    store.save(final, result)
    assert result.steps == 6 and {2, 4, 6} <= {step for step, _ in result.curve}
    assert result.nll == min(nll for _, nll in result.curve) > 0
    assert result.dev is not None and result.test is not None and 0 <= result.test <= 100
    assert result.signature.startswith("nrefs:1|")
    assert store.load(final) == result
    assert (store.work(final) / "checkpoints" / "checkpoint_best.pt").exists()
    kept = json.loads(store.path(final).read_text())["trial"]
    assert kept["settings"] == dict(final.settings) and kept["lr"] == 0.02
    # The identity holds all flags but those that a trial sets.
    words_of = shlex.split(store.identity["command"])
    assert "--max-update" in words_of and "--lr" not in words_of
    assert store.key(final) != store.key(trial("mrt"))
