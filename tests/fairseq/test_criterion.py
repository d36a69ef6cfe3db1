"""The criterion inside fairseq's own trainer: what is reported, and what moves the state s_t."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_trainer import Bench, taught_bench

from l2t_core.errors import UserError
from l2t_core.losses.taught import step_loss
from l2t_core.students.state import TrainStatistics

pytest.importorskip("fairseq")

import l2t_fairseq

l2t_fairseq.register()

from fairseq.logging import metrics  # noqa: E402
from fairseq.tasks.translation import TranslationConfig, TranslationTask  # noqa: E402

from l2t_fairseq.criterion import L2TDynamicCriterion, L2TDynamicCriterionConfig  # noqa: E402
from l2t_fairseq.expected_measure import (  # noqa: E402
    L2TExpectedMeasureConfig,
    L2TExpectedMeasureCriterion,
)
from l2t_fairseq.fingerprint import dictionary_fingerprint  # noqa: E402
from l2t_fairseq.reporting import (  # noqa: E402
    is_best,
    refuse_other_task,
    refuse_unreported_metric,
)
from l2t_fairseq.task import L2TTranslationTask  # noqa: E402

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(
    tmp_path: Path, toy_data: Path, write_teacher: Callable[..., Path]
) -> Iterator[MakeBench]:
    def make(*flags: str, **teacher: Any) -> Bench:
        teacher = {"warmup_steps": 1, "total_steps": 20, "dev_interval": 1, **teacher}
        path = write_teacher(tmp_path / "teacher.safetensors", toy_data, **teacher)
        return taught_bench(toy_data, path, tmp_path, *flags)

    yield make
    metrics.reset()


@pytest.mark.parametrize("task", ["translation", "l2t_translation"])
def test_statistics_are_those_of_the_whole_update(make_bench: MakeBench, task: str) -> None:
    bench = make_bench("--task", task, "--dropout", "0")
    two = bench.batches[:2]
    bench.model.train()
    with torch.no_grad():
        predictions = []
        for batch in two:
            log_probs = bench.model.get_normalized_probs(
                bench.model(**batch["net_input"]), log_probs=True
            )
            real = batch["target"] != bench.task.target_dictionary.pad()
            predictions.append((log_probs[real], batch["target"][real]))
    log_probs = torch.cat([p for p, _ in predictions])
    target = torch.cat([t for _, t in predictions])
    nll = float(torch.nn.functional.nll_loss(log_probs, target))
    accuracy = float((log_probs.argmax(1) == target).float().mean())

    logged = bench.trainer.train_step(two)

    train = bench.state()["applied"]["state"]["train"]
    assert train["nll"] == pytest.approx(nll, rel=1e-5)
    assert train["accuracy"] == pytest.approx(accuracy)
    assert bench.state()["applied"]["step"] == bench.trainer.get_num_updates() == 1
    assert logged["loss"] == pytest.approx(nll / math.log(2), abs=1e-3)  # a warm-up step
    assert logged["l2t_accuracy"] == pytest.approx(accuracy, abs=1e-3)


def test_the_loss_is_the_teachers_after_the_warm_up(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation", "--dropout", "0")
    batch = bench.batches[0]
    bench.trainer.train_step([batch])
    rate = bench.trainer.get_lr()
    bench.model.train()
    with torch.no_grad():
        log_probs = bench.model.get_normalized_probs(
            bench.model(**batch["net_input"]), log_probs=True
        )
        real = batch["target"] != bench.task.target_dictionary.pad()
        applied = bench.criterion.applied
        seen = torch.cat([applied.state.features(1, rate), applied.memory])
        assert not bool(applied.memory.any())  # no warm-up is remembered
        phi = applied.teacher(seen)
        losses = step_loss(applied.spec, log_probs[real], batch["target"][real], phi, 1)
    logged = bench.trainer.train_step([batch])
    assert logged["loss"] == pytest.approx(float(losses.mean()) / math.log(2), abs=2e-3)
    assert abs(logged["loss"] - logged["nll_loss"]) > 0.01


def test_learning_rates_are_those_of_the_updates(make_bench: MakeBench) -> None:
    seen: dict[str, list[tuple[int, float]]] = {}
    for task in ("translation", "l2t_translation"):
        bench = make_bench("--task", task)
        begin, calls = bench.criterion.applied.begin_step, seen.setdefault(task, [])

        def spy(rate: float, step: int | None = None, *, b=begin, c=calls, k=bench) -> Any:
            c.append((k.criterion.applied.step, rate))
            return b(rate, step)

        bench.criterion.applied.begin_step = spy  # type: ignore[method-assign]
        for batch in bench.batches[:6]:
            bench.trainer.train_step([batch])
    assert seen["translation"] == seen["l2t_translation"]
    # inverse_sqrt with 4 warm-up updates to 0.003: 0 at update 0.
    expected = [0.0, 0.00075, 0.0015, 0.00225, 0.003, 0.003 * 2 / math.sqrt(5)]
    assert [step for step, _ in seen["translation"]] == list(range(6))
    assert [rate for _, rate in seen["translation"]] == pytest.approx(expected)


def test_only_a_committed_update_moves_the_state(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench("--task", "l2t_translation")
    bench.trainer.train_step([bench.batches[0]])
    before = bench.state()
    # A forward pass whose result nobody uses.
    bench.model.train(), bench.criterion.train()
    bench.criterion(bench.model, bench.batches[1])
    assert bench.state() == before
    # A batch dropped for want of memory.
    with monkeypatch.context() as patch:
        patch.setattr(bench.trainer.optimizer, "backward", raiser(RuntimeError("out of memory")))
        assert bench.trainer.train_step([bench.batches[1]]) is None
    assert bench.state() == before
    # A gradient that overflowed. (fairseq moves a scalar to a GPU there.)
    with monkeypatch.context() as patch:
        patch.setattr(bench.task, "optimizer_step", raiser(OverflowError("too large")))
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        assert bench.trainer.train_step([bench.batches[1]]) is None
    assert bench.state() == before
    assert bench.trainer.get_num_updates() == 1
    # And one that counts.
    bench.trainer.train_step([bench.batches[1]])
    assert bench.state()["applied"]["step"] == 2
    assert bench.state()["applied"]["state"]["train"] != before["applied"]["state"]["train"]


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_dummy_batches_do_not_count(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation")
    bench.trainer.train_step([bench.batches[0]])
    before = bench.state()
    # What a process that has run out of batches contributes, summed over processes: zeros.
    bench.criterion.train()
    _, _, outputs = bench.criterion(bench.model, bench.batches[1])
    nothing = {key: value * 0 for key, value in outputs.items()}
    with metrics.aggregate() as logged:
        bench.task.reduce_metrics([nothing], bench.criterion)
    assert bench.state() == before
    assert "loss" not in logged  # and no 0/0 in the averages


@pytest.mark.parametrize("task", ["translation", "l2t_translation"])
def test_dev_statistics_come_from_the_first_subset(make_bench: MakeBench, task: str) -> None:
    bench = make_bench("--task", task, "--valid-subset", "valid,test")
    bench.trainer.train_step([bench.batches[0]])
    bench.validate("valid", "test")
    bench.model.eval()
    nll = correct = tokens = 0.0
    iterator = bench.trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False)
    with torch.no_grad():
        for batch in iterator:
            log_probs = bench.model.get_normalized_probs(
                bench.model(**batch["net_input"]), log_probs=True
            )
            real = batch["target"] != bench.task.target_dictionary.pad()
            picked = log_probs[real].gather(1, batch["target"][real].unsqueeze(1))
            nll -= float(picked.sum())
            correct += float((log_probs.argmax(2) == batch["target"])[real].sum())
            tokens += float(real.sum())
    state = bench.state()["applied"]
    assert state["step"] == 1
    assert state["state"]["dev"]["nll"] == pytest.approx(nll / tokens, rel=1e-5)
    assert state["state"]["dev"]["accuracy"] == pytest.approx(correct / tokens)


def test_a_dev_pass_counts_only_when_the_teacher_expects_one(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation", dev_interval=2)
    seen = []
    for batch in bench.batches[:5]:
        bench.trainer.train_step([batch])
        bench.validate("valid")
        seen.append(bench.state()["applied"]["state"]["dev"])
    assert seen[0] is None
    assert seen[1] == seen[2] != seen[3]
    assert seen[3] == seen[4]


def test_a_dev_pass_of_before_is_no_part_of_a_loaded_state(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation")
    bench.trainer.train_step([bench.batches[0]])
    before = bench.state()
    bench.validate("valid")
    bench.criterion.load_teacher_state(before)
    assert bench.state() == before


def test_a_jump_in_the_update_number_starts_a_new_state(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation")
    for batch in bench.batches[:3]:
        bench.trainer.train_step([batch])
    assert any(bench.state()["applied"]["memory"]["content"])
    bench.criterion.begin_update(40, 0.001)
    applied = bench.state()["applied"]
    assert not any(applied.pop("memory")["content"])
    assert applied == {"step": 40, "state": {"train": None, "dev": None}}


def test_a_new_state_sees_the_dev_set_as_soon_as_the_first_one(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation", dev_interval=2)
    for batch in bench.batches[:4]:
        bench.trainer.train_step([batch])
    bench.validate("valid")
    assert bench.state()["dev_counted_at"] == 4
    with metrics.aggregate(new_root=True):
        for update in (0, 1):  # as after --reset-optimizer
            bench.criterion.begin_update(update, 0.001)
            bench.criterion.finish_update(TrainStatistics(1.0, 0.5))
    bench.validate("valid")
    assert bench.state()["dev_counted_at"] == 2
    assert bench.state()["applied"]["state"]["dev"] is not None


def test_fairseq_sees_no_parameters(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation")
    criterion = bench.criterion
    assert not list(criterion.parameters()) and not list(criterion.buffers())
    assert not criterion.state_dict()
    theta = [p.clone() for p in criterion.applied.teacher.parameters()]
    criterion.half()
    assert criterion.logging_outputs_can_be_summed()
    bench.trainer.train_step([bench.batches[0]])
    after = list(criterion.applied.teacher.parameters())
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(theta, after, strict=True))


def test_a_loss_per_token_on_request(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation")
    bench.model.eval(), bench.criterion.eval()
    batch = bench.batches[0]
    with torch.no_grad():
        each, size, outputs = bench.criterion(bench.model, batch, reduce=False)
        total, _, _ = bench.criterion(bench.model, batch)
    assert each.shape == (batch["target"].numel(),)
    assert size == batch["ntokens"]
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(outputs["loss"], total)


@pytest.mark.parametrize(
    ("training", "with_gradient"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_only_a_training_step_is_taught(
    make_bench: MakeBench, training: bool, with_gradient: bool
) -> None:
    bench = make_bench("--task", "l2t_translation", warmup_steps=0)
    bench.criterion.train(training)
    bench.criterion.begin_update(0, 0.001)
    with torch.set_grad_enabled(with_gradient):
        loss, _, outputs = bench.criterion(bench.model, bench.batches[0])
    taught = training and with_gradient
    assert outputs["l2t_training"] == int(taught)
    assert bool(torch.isclose(loss, outputs["nll_loss"])) is not taught


@pytest.mark.parametrize(
    ("flags", "steps", "warmup"),
    [
        ([], 20, 4),  # 2 of the teacher's 10 steps are 4 of 20
        (["--l2t-total-steps", "40"], 40, 8),
        (["--l2t-warmup-steps", "0"], 20, 0),
    ],
)
def test_steps_are_scaled_to_the_run(
    make_bench: MakeBench, flags: list[str], steps: int, warmup: int
) -> None:
    applied = make_bench(*flags, warmup_steps=2, total_steps=10).criterion.applied
    assert (applied.state.total_steps, applied.spec.warmup_steps) == (steps, warmup)


def test_sentence_avg_is_as_in_cross_entropy(make_bench: MakeBench) -> None:
    bench = make_bench("--task", "l2t_translation", "--sentence-avg")
    _, size, outputs = bench.criterion(bench.model, bench.batches[0])
    assert size == outputs["sample_size"] == bench.batches[0]["target"].size(0)


def test_averages_over_updates_are_those_of_cross_entropy() -> None:
    """With ``--sentence-avg`` an update's loss weighs as many as it has sentences."""
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion

    averages = []
    for kind in (CrossEntropyCriterion, L2TDynamicCriterion):
        with metrics.aggregate(new_root=True) as logged:
            for loss, tokens, sentences in ((60.0, 20, 2), (9.0, 6, 3)):
                output = {"loss": loss, "nll_loss": loss, "ntokens": tokens, "n_correct": 1,
                          "nsentences": sentences, "sample_size": sentences}  # fmt: skip
                kind.reduce_metrics([output])
        averages.append({name: logged[name].avg for name in ("loss", "nll_loss")})
    assert averages[0] == averages[1]
    assert averages[0]["loss"] == pytest.approx(69 / 5 / math.log(2))


def test_the_summary_of_phi_is_of_the_last_update(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the rate is, and no mean over the updates since the last line of the log."""
    criterion = make_bench("--task", "l2t_translation").criterion
    monkeypatch.setattr(criterion.applied, "commit", lambda statistics: None)
    with metrics.aggregate(new_root=True) as logged:
        for middle in (1.0, 5.0, 3.0):
            phi = {"d": torch.tensor([middle - 1.0, middle, middle + 1.0])}
            monkeypatch.setattr(criterion.applied, "coefficients", phi)
            criterion.finish_update(TrainStatistics(1.0, 0.5))
    assert logged.get_smoothed_value("l2t_d") == 3.0
    assert logged.get_smoothed_value("l2t_d_std") == 1.0


def dictionary(*symbols: str) -> Any:
    return type("Dictionary", (SimpleNamespace,), {"__len__": lambda self: len(self.symbols)})(
        symbols=list(symbols)
    )


def test_a_fingerprint_depends_on_symbols_and_order() -> None:
    first = dictionary_fingerprint(dictionary("a", "b"))
    assert first["num_classes"] == 2
    assert first == dictionary_fingerprint(dictionary("a", "b"))
    others = [dictionary("b", "a"), dictionary("a", "b", "c"), dictionary("ab", "")]
    assert all(dictionary_fingerprint(other)["sha256"] != first["sha256"] for other in others)


def test_another_dictionary_is_refused(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench("--task", "l2t_translation")
    bench.task.tgt_dict.add_symbol("one-more")
    with pytest.raises(UserError, match="does not fit") as caught:
        L2TDynamicCriterion(bench.task, str(tmp_path / "teacher.safetensors"), 20)
    size = len(bench.task.tgt_dict)
    assert str(size) in str(caught.value) and str(size - 1) in str(caught.value)


@pytest.mark.parametrize("form", ["shared", "banded"])
def test_a_loss_without_numbers_for_entries_fits_another_dictionary(
    make_bench: MakeBench, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    bench = make_bench("--task", "l2t_translation", form=form)
    before = len(bench.task.tgt_dict)
    bench.task.tgt_dict.add_symbol("one-more")
    with caplog.at_level("INFO"):
        criterion = L2TDynamicCriterion(bench.task, str(tmp_path / "teacher.safetensors"), 20)
    assert f"another dictionary, of {before:,}" in caplog.text
    assert f"fits this one of {before + 1:,}" in caplog.text
    assert criterion.applied.state.num_classes == before + 1


def test_the_best_class_is_the_argmax() -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(200, 7, generator=generator).log_softmax(1)
    target = torch.randint(7, (200,), generator=generator)
    nll = -log_probs.gather(1, target.unsqueeze(1)).squeeze(1)
    assert torch.equal(is_best(log_probs, nll), log_probs.argmax(1) == target)
    uniform = torch.zeros(3, 7).log_softmax(1)  # a model that has not begun to learn
    assert not is_best(uniform, -uniform[:, 0]).any()


def nothing() -> Any:
    return SimpleNamespace(target_dictionary=None)


def levenshtein() -> Any:
    """Return a task of fairseq's that builds on translation and makes other batches."""
    from fairseq.tasks.translation_lev import (
        TranslationLevenshteinConfig,
        TranslationLevenshteinTask,
    )

    words = dictionary()
    return TranslationLevenshteinTask(TranslationLevenshteinConfig(), words, words)


@pytest.mark.parametrize("kind", [L2TDynamicCriterion, L2TExpectedMeasureCriterion])
@pytest.mark.parametrize(
    ("make", "name"),
    [(nothing, "SimpleNamespace"), (levenshtein, "TranslationLevenshteinTask")],
)
def test_other_tasks_are_refused(
    kind: Any, make: Callable[[], Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their dictionary need not be the target's: a wrong teacher would be taken for the right."""
    names = [*L2TDynamicCriterionConfig.__dataclass_fields__]
    names += L2TExpectedMeasureConfig.__dataclass_fields__
    cfg = SimpleNamespace(**dict.fromkeys(names, 1))
    with pytest.raises(SystemExit) as ended:
        kind.build_criterion(cfg, make())
    assert ended.value.code == 2
    assert f"and this is a {name}; use --task translation" in capsys.readouterr().err


class Own(TranslationTask):
    """A task of another package."""


def test_a_task_of_the_users_own_passes() -> None:
    own = Own(TranslationConfig(), dictionary(), dictionary())
    refuse_other_task(own, "l2t_dynamic")
    refuse_unreported_metric(SimpleNamespace(best_checkpoint_metric="f1"), own)


@pytest.mark.parametrize("kind", [TranslationTask, L2TTranslationTask])
@pytest.mark.parametrize(
    ("metric", "eval_bleu", "says"),
    [
        ("accuracy", False, "accuracy is not reported by this run's validation; did you mean 'l2t"),
        ("nll_los", False, "did you mean 'nll_loss'"),
        ("bleu", False, "; add --eval-bleu (reported: loss, nll_loss, ppl, l2t_accuracy)"),
        ("bleu", True, None),
        ("l2t_accuracy", False, None),
        ("wpb", False, None),
    ],
)
def test_a_metric_that_no_validation_reports_is_refused_at_once(
    kind: Any, metric: str, eval_bleu: bool, says: str | None
) -> None:
    """By itself fairseq ends in a KeyError after the first validation, perhaps hours later."""
    task = kind(TranslationConfig(eval_bleu=eval_bleu), dictionary(), dictionary())
    cfg = SimpleNamespace(best_checkpoint_metric=metric)
    if says is None:
        refuse_unreported_metric(cfg, task)
        return
    with pytest.raises(UserError) as refused:
        refuse_unreported_metric(cfg, task)
    assert says in str(refused.value)


def test_a_command_whose_metric_is_not_reported_ends_in_one_line(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_bench("--task", "translation", "--best-checkpoint-metric", "accuracy")
    assert ended.value.code == 2
    assert "l2t: error: --best-checkpoint-metric accuracy" in capsys.readouterr().err


def test_what_fairseq_says_about_a_criterion_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions say that a configuration comes from a checkpoint and may lack some keys."""
    told = []
    monkeypatch.setattr(
        TranslationTask, "build_criterion", lambda self, cfg, **kwargs: told.append((cfg, kwargs))
    )
    task = L2TTranslationTask(TranslationConfig(), dictionary(), dictionary())
    task.build_criterion("cfg")
    task.build_criterion("cfg", from_checkpoint=True)
    assert told == [("cfg", {}), ("cfg", {"from_checkpoint": True})]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--arch", "nonautoregressive_transformer"], "does not translate word by word"),
        (["--adaptive-softmax-cutoff", "5,10"], "leave the flag out"),
    ],
)
def test_models_that_cannot_be_taught_end_in_one_line(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    bench = make_bench("--task", "l2t_translation", *flags)
    with pytest.raises(SystemExit) as ended:
        bench.trainer.train_step([bench.batches[0]])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert said.startswith("l2t: error: ") and says in said
