"""The criterion ``l2t_expected_measure``: its gradient, candidates, and runs of fairseq-train."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_fairseq import TINY_MODEL, TINY_RUN, USER_DIR, run_module
from toy_processes import nearly_same, together
from toy_runs import Result, Runs, same_parameters
from toy_trainer import Bench

from l2t_core.errors import UserError
from l2t_fairseq.checkpoints import export_checkpoint
from l2t_fairseq.commands.train import FairseqCommand, with_value
from l2t_fairseq.recipe import NmtSpec

pytest.importorskip("fairseq")

import l2t_fairseq

l2t_fairseq.register()

from fairseq import utils  # noqa: E402
from fairseq.logging import metrics  # noqa: E402

from l2t_fairseq.expected_measure import L2TExpectedMeasureCriterion  # noqa: E402
from l2t_fairseq.measures.sampling import length_limit  # noqa: E402

CRITERION = ["--user-dir", str(USER_DIR), "--criterion", "l2t_expected_measure"]


def make_bench(data: Path, save_dir: Path, *flags: str) -> Bench:
    return Bench(data, save_dir, *CRITERION[2:], *flags)


@pytest.fixture(autouse=True)
def _clean_metrics() -> Iterator[None]:
    yield
    metrics.reset()


def loss_of(bench: Bench, sample: Any, **more: Any) -> torch.Tensor:
    """Return the training loss, with the same draws each time."""
    torch.manual_seed(5)
    bench.model.train(), bench.criterion.train()
    return bench.criterion(bench.model, sample, **more)[0]


SOURCES = {
    "ancestral": [],
    "nucleus": ["--l2t-top-p", "0.8", "--l2t-measure", "expected_chrf", "--l2t-alpha", "0.3"],
    "beam": ["--l2t-beam", "6"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_gradient_equals_central_differences(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """In float64, with dropout, at the candidates that were found."""
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: x.softmax(dim))
    monkeypatch.setattr(utils, "log_softmax", lambda x, dim, onnx_trace=False: x.log_softmax(dim))
    bench = make_bench(toy_data, tmp_path, "--l2t-candidates", source, "--l2t-samples", "5",
                       "--l2t-ce-mix", "0.25", *SOURCES[source])  # fmt: skip
    sample = bench.batches[0]
    bench.model.double()
    parameters = list(bench.model.parameters())
    # An encoder layer of fairseq 0.12.2 has parameters that nothing reads.
    gradient = torch.autograd.grad(
        loss_of(bench, sample), parameters, allow_unused=True, materialize_grads=True
    )
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    values, h = [], 1e-6
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * h)
        values.append(loss_of(bench, sample).item())
    numeric = (values[0] - values[1]) / (2 * h)
    found = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    assert abs(numeric) > 1e-3
    assert found == pytest.approx(numeric, rel=1e-5)


def test_a_measure_of_ones_own_that_fails_ends_the_run_in_one_line(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "failing_measure.py").write_text("def share(h, r):\n    return {}[h]\n")
    monkeypatch.chdir(tmp_path)
    bench = make_bench(toy_data, tmp_path, "--l2t-measure", "failing_measure:share")
    with pytest.raises(SystemExit) as ended:
        loss_of(bench, bench.batches[0])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert line.startswith("l2t: error: nmt.measure failing_measure:share fails on")


def test_the_loss_is_shen_et_als(toy_data: Path, tmp_path: Path) -> None:
    """Computed anew: one candidate at a time through the whole model, weights from equation 9."""
    bench = make_bench(toy_data, tmp_path, "--dropout", "0", "--l2t-ce-mix", "0.25",
                       "--l2t-alpha", "0.5", "--l2t-samples", "4")  # fmt: skip
    sample, criterion, model = bench.batches[0], bench.criterion, bench.model
    words = bench.task.target_dictionary
    total = loss_of(bench, sample).item()
    torch.manual_seed(5)
    seed = int(torch.randint(2**31, ()))
    model.eval()
    net_input = sample["net_input"]
    drawn = criterion.source.draw(
        criterion.spec, model, net_input, length_limit(model, net_input), seed, words
    )
    assert len({c for of in drawn for c in of}) > 4  # something to weigh

    def log_prob(row: int, tokens: list[int], ended: bool = True) -> float:
        length = int(net_input["src_lengths"][row])
        source = net_input["src_tokens"][row : row + 1, -length:]  # padded on the left
        output = model(source, torch.tensor([length]), torch.tensor([[words.eos(), *tokens]]))
        scores = model.get_normalized_probs(output, log_probs=True)[0]
        spelled = [*tokens, words.eos()] if ended else tokens  # a forced end is certain
        return float(sum(scores[i, token] for i, token in enumerate(spelled)))

    expected = 0.0
    for row, candidates in enumerate(drawn):
        target = [t for t in sample["target"][row].tolist() if t != words.pad()]
        reference = words.string(torch.tensor(target))
        distinct = list(dict.fromkeys(candidates))
        found = [log_prob(row, list(c.tokens), c.ended) for c in distinct]
        weights = (0.5 * torch.tensor(found)).softmax(0)
        texts = [words.string(torch.tensor(c.tokens, dtype=torch.long)) for c in distinct]
        (scores,) = criterion.measure.scores([texts], [reference])
        risk = 1.0 - float((weights * torch.tensor(scores)).sum())
        expected += -0.25 * log_prob(row, target[:-1]) + 0.75 * len(target) * risk
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_loss_per_token_on_request(toy_data: Path, tmp_path: Path) -> None:
    bench = make_bench(toy_data, tmp_path)
    sample = bench.batches[0]
    each = loss_of(bench, sample, reduce=False)
    assert each.shape == (sample["target"].numel(),)
    assert not each[sample["target"].view(-1) == bench.task.target_dictionary.pad()].any()
    torch.testing.assert_close(each.sum(), loss_of(bench, sample))


def test_it_teaches_what_it_measures(toy_data: Path, tmp_path: Path) -> None:
    """Updates on the risk alone raise the expected measure of the batches they see."""
    bench = make_bench(toy_data, tmp_path, "--l2t-ce-mix", "0", "--l2t-measure", "expected_chrf",
                       "--l2t-samples", "16", "--l2t-alpha", "0.2", "--dropout", "0",
                       "--lr", "0.01", "--lr-scheduler", "fixed")  # fmt: skip
    logged = [bench.trainer.train_step([bench.batches[i % 2]]) for i in range(30)]
    measured = [entry["l2t_measure"] for entry in logged]
    assert sum(measured[-4:]) / 4 > sum(measured[:4]) / 4 + 0.05


def test_candidates_are_weighed_with_dropout(toy_data: Path, tmp_path: Path) -> None:
    """As any training step computes: other masks, other weights of the same candidates."""
    bench = make_bench(toy_data, tmp_path, "--dropout", "0.3")
    criterion, sample, words = bench.criterion, bench.batches[0], bench.task.target_dictionary
    net_input = sample["net_input"]
    bench.model.eval()
    found = criterion.source.draw(
        criterion.spec, bench.model, net_input, length_limit(bench.model, net_input), 1, words
    )
    criterion.source = dataclasses.replace(criterion.source, draw=lambda *given: found)
    criterion._scores = lambda of, sample: [[i / 10 for i in range(len(c))] for c in of]
    bench.model.train()
    values = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        values.append(criterion.expectations(bench.model, sample).detach())
    assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 5}, "--l2t-top-k has no effect with --l2t-candidates=ancestral; use top-k"),
        ({"measure": "expected_blue"}, "did you mean 'expected_bleu'"),
        ({"measure": "log_likelihood"}, "use --criterion cross_entropy"),
        ({"samples": 1}, "--l2t-samples is 1; it must be at least 2"),
        ({"candidates": "beam", "beam": 600}, "too wide for the"),
        ({"candidates": "beam", "samples": 600}, "set --l2t-beam or --l2t-samples to"),
        ({"ce_mix": 1.5}, "--l2t-ce-mix is 1.5; it must lie in [0, 1]"),
        ({"warmup_steps": -1}, "--l2t-warmup-steps is -1"),
        ({"tokenizer": "mozes"}, "--l2t-tokenizer is 'mozes'; use moses or none"),
    ],
)
def test_impossible_settings_are_refused(
    toy_data: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    task = make_bench(toy_data, tmp_path).task
    own = {k: changes[k] for k in ("ce_mix", "warmup_steps", "tokenizer") if k in changes}
    spec = NmtSpec(**{k: v for k, v in changes.items() if k not in own})
    with pytest.raises(UserError) as caught:
        L2TExpectedMeasureCriterion(task, spec, **own)
    assert said in str(caught.value)


# -- fairseq's commands


def train(command: FairseqCommand, folder: Path, *flags: str) -> Result:
    command = with_value(command, "--save-dir", str(folder))
    done = run_module("fairseq_cli.train", [*command.arguments, *CRITERION, *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def entries(done: Result, kind: str) -> list[dict[str, str]]:
    return [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines()
            if f"| {kind} |" in line and "{" in line]  # fmt: skip


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


@pytest.mark.parametrize("task", ["translation", "l2t_translation"])
def test_its_warm_up_is_cross_entropy_to_the_bit(runs: Runs, tmp_path: Path, task: str) -> None:
    done = train(runs.plain(), tmp_path, "--task", task, "--l2t-warmup-steps", "20")
    assert same_parameters(last(tmp_path), runs.checkpoint("plain"))
    assert all("l2t_measure" not in entry for entry in entries(done, "train_inner"))
    # Dev is measured all the while: the best checkpoint may lie before the first such update.
    assert 0 <= float(entries(done, "valid")[-1]["valid_l2t_measure"]) <= 1


BOTH = ["--task", "l2t_translation", "--l2t-warmup-steps", "8", "--best-checkpoint-metric",
        "l2t_measure", "--maximize-best-checkpoint-metric"]  # fmt: skip


@pytest.fixture(scope="module")
def both(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Return a run of cross-entropy and then the risk: its folder and output."""
    folder = tmp_path_factory.mktemp("both")
    return folder, train(runs.plain(), folder, *BOTH)


def test_the_risk_follows_the_warm_up(runs: Runs, both: tuple[Path, Result]) -> None:
    folder, done = both
    logged = entries(done, "train_inner")
    assert [("l2t_measure" in entry) for entry in logged] == [False] * 8 + [True] * 12
    assert not same_parameters(last(folder), runs.checkpoint("plain"))
    best = max(float(entry["valid_l2t_measure"]) for entry in entries(done, "valid"))
    saved = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    assert saved["extra_state"]["best"] == pytest.approx(best, abs=1e-4)


def test_it_resumes_to_the_bit(runs: Runs, both: tuple[Path, Result], tmp_path: Path) -> None:
    shutil.copy(both[0] / "checkpoint_2_10.pt", tmp_path / "checkpoint_last.pt")
    train(runs.plain(), tmp_path, *BOTH)
    assert same_parameters(last(tmp_path), last(both[0]))


def test_it_goes_on_from_a_checkpoint_of_cross_entropy(runs: Runs, tmp_path: Path) -> None:
    start = str(runs.root / "plain/checkpoint_last.pt")
    done = train(runs.plain(), tmp_path, "--finetune-from-model", start, "--max-update", "2")
    first, fresh = entries(done, "train_inner")[0], runs.logged("plain")[0]
    assert first["num_updates"] == "1" and "l2t_measure" in first
    assert float(first["nll_loss"]) < float(fresh["loss"]) - 0.3


def test_an_export_does_not_name_it(both: tuple[Path, Result], tmp_path: Path) -> None:
    export_checkpoint([both[0] / "checkpoint_last.pt"], tmp_path / "student.pt")
    exported = torch.load(tmp_path / "student.pt", weights_only=True)
    assert exported["cfg"]["criterion"]["_name"] == "cross_entropy"
    assert "l2t" not in json.dumps(exported["cfg"])


def test_two_processes_are_one(toy_data: Path, tmp_path: Path) -> None:
    """Each of the two has one of the update's batches; the beam does not depend on draws."""
    arguments = [str(toy_data), *TINY_MODEL, *TINY_RUN, *CRITERION, "--dropout", "0",
                 "--required-batch-size-multiple", "1", "--optimizer", "sgd", "--lr", "0.5",
                 "--max-update", "5", "--l2t-warmup-steps", "2", "--l2t-candidates", "beam",
                 "--l2t-ce-mix", "0.2"]  # fmt: skip
    one = run_module(
        "fairseq_cli.train", [*arguments, "--update-freq", "2", "--save-dir", str(tmp_path / "one")]
    )
    assert one.returncode == 0, one.stderr[-2000:]
    folder = ["--save-dir", str(tmp_path / "two")]
    pair = together(arguments, folder, folder)
    assert [r.returncode for r in pair] == [0, 0], pair[0].stderr[-2000:]
    nearly_same(last(tmp_path / "one"), last(tmp_path / "two"))
    first, second = (entries(run, "train_inner")[4]["l2t_measure"] for run in (one, pair[0]))
    assert float(first) == pytest.approx(float(second), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--l2t-candidates", "beem"], "did you mean 'beam'"),
        (["--best-checkpoint-metric", "accuracy"], "(reported: loss, nll_loss, ppl, l2t_accuracy, "
                                                   "l2t_measure)"),
    ],
)  # fmt: skip
def test_a_user_mistake_is_one_line(
    runs: Runs, tmp_path: Path, flags: list[str], said: str
) -> None:
    command = with_value(runs.plain(), "--save-dir", str(tmp_path))
    done = run_module("fairseq_cli.train", [*command.arguments, *CRITERION, *flags])
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("l2t: error: ") and said in line
