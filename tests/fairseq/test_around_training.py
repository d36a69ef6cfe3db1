"""What people do with fairseq beside training: every command on a taught checkpoint."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from toy_fairseq import USER_DIR, run_module
from toy_runs import STEPS, Result, Runs, hydra_run, same_parameters

from l2t_fairseq.checkpoints import export_checkpoint
from l2t_fairseq.commands.train import FairseqCommand, with_value

pytest.importorskip("fairseq")

BATCHES = ["--cpu", "--batch-size", "12", "--required-batch-size-multiple", "1"]
GENERATE = [*BATCHES, "--beam", "2", "--max-len-b", "8"]


# What fairseq 0.12.2 needs without the plugin: it bars a fused encoder that torch has changed.
UNFUSED = ["--model-overrides", "{'checkpoint_activations': True}"]


def run_alone(module: str, arguments: list[str]) -> Result:
    """Run a command of fairseq without the plugin."""
    done = run_module(module, arguments)
    if "Mask Type should be defined" in done.stderr:
        return run_module(module, [*arguments, *UNFUSED])
    return done


def valid_line(result: Result) -> dict[str, str]:
    """Return what fairseq-validate measured."""
    assert result.returncode == 0, result.stderr[-2000:]
    line = next(text for text in result.stdout.splitlines() if "valid_loss" in text)
    return json.loads(line[line.index("{") :])


def hypotheses(result: Result) -> list[str]:
    assert result.returncode == 0, result.stderr[-2000:]
    return sorted(line for line in result.stdout.splitlines() if line.startswith("H-"))


@pytest.fixture(scope="module")
def exported(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export of the taught student."""
    path = tmp_path_factory.mktemp("exported") / "student.pt"
    export_checkpoint([runs.root / "real/checkpoint_last.pt"], path)
    return path


def test_validate_reports_the_plain_likelihood(runs: Runs, exported: Path) -> None:
    path = str(runs.root / "real/checkpoint_last.pt")
    arguments = [str(runs.data), *BATCHES, "--log-format", "json"]
    plugin = ["--user-dir", str(USER_DIR), "--task", "l2t_translation"]
    taught = valid_line(run_module("fairseq_cli.validate", [*arguments, *plugin, "--path", path]))
    clean = valid_line(
        run_alone(
            "fairseq_cli.validate", [*arguments, "--task", "translation", "--path", str(exported)]
        )
    )
    assert taught["valid_nll_loss"] == clean["valid_loss"] == taught["valid_loss"]
    assert taught["valid_ppl"] == clean["valid_ppl"]


def test_validate_where_the_teacher_has_moved(runs: Runs, tmp_path: Path) -> None:
    state = runs.checkpoint("real")
    state["cfg"]["criterion"]["l2t_teacher"] = "gone.safetensors"
    torch.save(state, tmp_path / "moved.pt")
    arguments = [str(runs.data), *BATCHES, "--log-format", "json", "--user-dir", str(USER_DIR),
                 "--task", "l2t_translation", "--path", str(tmp_path / "moved.pt")]  # fmt: skip
    lost = run_module("fairseq_cli.validate", arguments)
    said = lost.stderr.splitlines()[-1]
    assert lost.returncode == 2 and "gone.safetensors" in said
    assert "if it has moved, give --criterion l2t_dynamic --l2t-teacher FILE" in said
    there = ["--criterion", "l2t_dynamic", "--l2t-teacher", str(runs.teachers["real"])]
    assert valid_line(run_module("fairseq_cli.validate", [*arguments, *there]))


def test_interactive_and_generate_agree_without_the_plugin(
    runs: Runs, exported: Path, tmp_path: Path
) -> None:
    from fairseq.data import Dictionary, data_utils

    taught = str(runs.root / "real/checkpoint_last.pt")
    generated = [
        hypotheses(run_alone("fairseq_cli.generate", [str(runs.data), *GENERATE, "--path", path]))
        for path in (taught, str(exported))
    ]
    assert generated[0] == generated[1] and len(generated[0]) == 12
    dictionary = Dictionary.load(str(runs.data / "dict.de.txt"))
    source = data_utils.load_indexed_dataset(str(runs.data / "test.de-en.de"), dictionary)
    lines = [dictionary.string(source[i]) for i in range(len(source))]
    (tmp_path / "in").write_text("\n".join(lines) + "\n")
    translated = run_alone(
        "fairseq_cli.interactive",
        [str(runs.data), *GENERATE[5:], "--cpu", "--path", taught, "--input", str(tmp_path / "in")],
    )

    def texts(lines: list[str]) -> list[str]:
        return sorted(line.split("\t")[2] for line in lines)

    assert texts(hypotheses(translated)) == texts(generated[0])


def test_fairseqs_own_averaging_reads_taught_checkpoints(runs: Runs, tmp_path: Path) -> None:
    """The steps of fairseq's scripts/average_checkpoints.py, which the wheels leave out."""
    from fairseq.file_io import PathManager

    total: OrderedDict[str, torch.Tensor] = OrderedDict()
    files = [runs.root / f"real/checkpoint{epoch}.pt" for epoch in (1, 2)]
    for file in files:
        with PathManager.open(str(file), "rb") as handle:
            state = torch.load(handle, map_location="cpu")  # as it is called there: no arguments
        for key, tensor in state["model"].items():
            total[key] = total[key] + tensor if key in total else tensor
    state["model"] = OrderedDict((key, tensor / 2) for key, tensor in total.items())
    torch.save(state, tmp_path / "by-script.pt")
    export_checkpoint(files, tmp_path / "by-export.pt")
    found = [
        hypotheses(
            run_alone(
                "fairseq_cli.generate",
                [str(runs.data), *GENERATE, "--path", str(tmp_path / f"{name}.pt")],
            )
        )
        for name in ("by-script", "by-export")
    ]
    assert found[0] == found[1]


def test_training_goes_on_from_an_export(runs: Runs, exported: Path, tmp_path: Path) -> None:
    plain = with_value(runs.plain(), "--save-dir", str(tmp_path / "tuned"))
    command = FairseqCommand({}, [], [*plain.arguments, "--finetune-from-model", str(exported)])
    tuned = run_module("fairseq_cli.train", with_value(command, "--max-update", "2").arguments)
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    fresh = next(entry for entry in runs.logged("plain") if "loss" in entry)
    line = next(text for text in tuned.stdout.splitlines() if "train_inner" in text)
    first = json.loads(line[line.index("{") :])
    assert first["num_updates"] == "1"
    assert float(first["loss"]) < float(fresh["loss"]) - 0.3


@pytest.mark.parametrize("task", ["translation", "l2t_translation"])
def test_hydra_trains_the_same_student(runs: Runs, tmp_path: Path, task: str) -> None:
    criterion = f"_name: l2t_dynamic, l2t_teacher: {runs.teachers['real']}"
    common = f"user_dir: {USER_DIR}, log_format: json, log_interval: 1"
    hydra_run(tmp_path / "run", f"_name: {task}, data: {runs.data}", criterion, common, STEPS)
    by_hydra = torch.load(tmp_path / "run/checkpoint_last.pt", weights_only=True)
    by_flags = runs.checkpoint("real")
    assert by_hydra["optimizer_history"][-1]["num_updates"] == STEPS
    assert same_parameters(by_hydra, by_flags)
    export_checkpoint([tmp_path / "run/checkpoint_last.pt"], tmp_path / "clean.pt")
    if task == "translation":
        arguments = [str(runs.data), *GENERATE, "--path", str(tmp_path / "clean.pt")]
        assert len(hypotheses(run_alone("fairseq_cli.generate", arguments))) == 12


def test_hydra_knows_the_settings_by_type() -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    import l2t_fairseq

    l2t_fairseq.register()
    stored = ConfigStore.instance().load("criterion/l2t_dynamic.yaml").node
    assert OmegaConf.is_config(stored)
    assert stored._name == "l2t_dynamic" and stored.l2t_teacher is None
    assert ConfigStore.instance().load("task/l2t_translation.yaml").node._name == "l2t_translation"


def test_best_checkpoints_by_bleu(runs: Runs, tmp_path: Path) -> None:
    command = with_value(runs.taught("real"), "--save-dir", str(tmp_path / "run"))
    flags = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 10}', "--eval-bleu-detok",
             "space", "--best-checkpoint-metric", "bleu",
             "--maximize-best-checkpoint-metric"]  # fmt: skip
    done = run_module("fairseq_cli.train", [*command.arguments, *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    entries = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines()
               if "| valid |" in line]  # fmt: skip
    # The dev statistics reach the teacher as without BLEU: the student is the same.
    assert {"valid_loss", "valid_nll_loss", "valid_ppl", "valid_bleu"} <= entries[-1].keys()
    best = max(float(entry["valid_bleu"]) for entry in entries)
    assert float(entries[-1]["valid_best_bleu"]) == best
    saved = torch.load(tmp_path / "run/checkpoint_best.pt", weights_only=True)
    assert saved["extra_state"]["best"] == pytest.approx(best, abs=0.01)
    last = torch.load(tmp_path / "run/checkpoint_last.pt", weights_only=True)
    assert same_parameters(last, runs.checkpoint("real"))


def test_logs_hold_a_summary_of_the_coefficients(runs: Runs) -> None:
    updates = [entry for entry in runs.logged("real") if "loss" in entry]
    names = {"loss", "nll_loss", "ppl", "l2t_accuracy", "l2t_W", "l2t_W_std", "l2t_b", "l2t_b_std"}
    assert all(names <= entry.keys() for entry in updates)
    from l2t_core.teachers.applied import AppliedTeacher

    state = runs.checkpoint("real", "checkpoint_2_10.pt")["extra_state"]["train_iterator"]["l2t"]
    applied = AppliedTeacher.from_file(runs.teachers["real"], STEPS)
    applied.load_state_dict(state["applied"])
    phi = applied.begin_step(float(updates[9]["lr"]))  # the rate after update 10 is the next one's
    assert float(updates[10]["l2t_W"]) == pytest.approx(float(phi["W"].mean()), abs=1e-4)
    assert float(updates[10]["l2t_W_std"]) == pytest.approx(float(phi["W"].std()), abs=1e-4)
