"""fairseq-train commands as people write them, and what teaching them makes of them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT  # type: ignore[import-not-found]

from l2t_core.errors import UserError
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.teachers.file import TeacherHeader
from l2t_fairseq.commands.taught import keeps_the_worst, resumable, teach_command
from l2t_fairseq.commands.train import (
    FairseqCommand,
    has_flag,
    looks_like_training,
    parse_command,
    parse_script,
    save_dir,
    shell_text,
    value_of,
    with_value,
)

TEACHER, USER_DIR = Path("t.safetensors"), Path("/plugins/l2t_fairseq")
HEADER = TeacherHeader(TeacherSpec(features=["progress", "dev_nll"]), LossSpec(), 100, 200, 10, {})
BASE = "fairseq-train data-bin --arch transformer --max-update 1000"


def teach(text: str) -> list[str]:
    return teach_command(
        parse_command(shlex.split(text)), TEACHER, HEADER, USER_DIR
    ).command.arguments


def test_a_default_command_gets_all_that_the_plugin_needs() -> None:
    # dev_interval 10 of 200 steps is 50 of 1000.
    assert teach(BASE) == shlex.split(
        "data-bin --arch transformer --max-update 1000 --criterion l2t_dynamic "
        "--task l2t_translation --user-dir /plugins/l2t_fairseq --l2t-teacher t.safetensors "
        "--validate-interval-updates 50"
    )


def test_other_flags_keep_their_place_and_form() -> None:
    taught = teach(
        "fairseq-train data-bin -a=x --task=translation --adam-betas '(0.9, 0.98)' "
        "--criterion=label_smoothed_cross_entropy --label-smoothing 0.1 --lr 5e-4 "
        "--report-accuracy --ignore-prefix-size=1 --fp16 --max-update=1000 "
        "--validate-interval-updates 7"
    )
    assert taught == [
        "data-bin",
        "-a=x",
        "--task=l2t_translation",
        "--adam-betas",
        "(0.9, 0.98)",
        "--criterion=l2t_dynamic",
        "--lr",
        "5e-4",
        "--fp16",
        "--max-update=1000",
        "--validate-interval-updates",
        "7",
        "--user-dir",
        "/plugins/l2t_fairseq",
        "--l2t-teacher",
        "t.safetensors",
    ]


def test_changes_are_told() -> None:
    command = parse_command(
        shlex.split(f"{BASE} --criterion label_smoothed_cross_entropy --label-smoothing 0.1")
    )
    changes = teach_command(command, TEACHER, HEADER, USER_DIR).changes
    assert "--criterion label_smoothed_cross_entropy -> l2t_dynamic" in changes
    assert "--task translation -> l2t_translation, so that a resumed run is exact" in changes
    assert any(change.startswith("--label-smoothing removed") for change in changes)


def test_teaching_twice_is_teaching_once() -> None:
    once = teach_command(parse_command(shlex.split(BASE)), TEACHER, HEADER, USER_DIR).command
    twice = teach_command(once, TEACHER, HEADER, USER_DIR)
    assert twice.command == once
    assert twice.changes == []


def test_the_old_criterions_accuracy_is_renamed_not_lost() -> None:
    taught = teach(
        f"{BASE} --criterion label_smoothed_cross_entropy --report-accuracy "
        "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric"
    )
    assert taught[taught.index("--best-checkpoint-metric") + 1] == "l2t_accuracy"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", False),
        ("--best-checkpoint-metric nll_loss", False),
        ("--best-checkpoint-metric bleu --maximize-best-checkpoint-metric", False),
        ("--best-checkpoint-metric bleu", True),
        ("--best-checkpoint-metric=l2t_accuracy", True),
    ],
)
def test_a_command_that_keeps_its_worst_checkpoint_is_told(flags: str, told: bool) -> None:
    said = keeps_the_worst(parse_command(shlex.split(f"{BASE} {flags}")))
    assert ("add --maximize-best-checkpoint-metric" in said) == told


def test_a_folder_with_the_plugin_in_it_and_a_task_built_on_ours_stay() -> None:
    folder, command = Path("/mine"), parse_command([*BASE.split(), "--user-dir", "/mine"])
    taught = teach_command(command, TEACHER, HEADER, folder, ["mine"])
    assert value_of(taught.command, "--user-dir") == "/mine"
    assert value_of(taught.command, "--task") == "l2t_translation"
    assert not [change for change in taught.changes if "--user-dir" in change]
    own = with_value(command, "--task", "mine")
    taught = teach_command(own, TEACHER, HEADER, folder, ["mine"])
    for made in (taught.command, resumable(own, folder, ["mine"])):
        assert value_of(made, "--task") == "mine"
    assert value_of(resumable(command, folder, ["mine"]), "--task") == "l2t_translation"
    assert resumable(own, USER_DIR, ["mine"]) == own  # another plugin, without ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BASE} --task language_modeling", "language_modeling cannot be taught"),
        (f"{BASE} --task=translation_lev", "translation_lev cannot be taught"),
        (f"{BASE} --criterion masked_lm", "masked_lm cannot be replaced"),
        (f"{BASE} --criterion=ctc", "ctc cannot be replaced"),
        (f"{BASE} --criterion adaptive_loss", "adaptive_loss cannot be replaced"),
        (f"{BASE} --user-dir /elsewhere", "takes only one"),
        (f"{BASE} --user-dir /elsewhere --task mine", "mine cannot .*L2TTranslationTask"),
        (f"{BASE} --disable-validation", "--disable-validation"),
        ("fairseq-train data-bin --arch transformer", "add --max-update N"),
        ("fairseq-train data-bin --max-update x", "no positive whole number"),
        ("fairseq-train data-bin --max-update 0", "no positive whole number"),
    ],
)
def test_what_cannot_be_taught_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        teach(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fairseq-hydra-train task.data=x", "not supported yet"),
        ("python -m fairseq_cli.hydra_train task.data=x", "not supported yet"),
        ("fairseq-trian data", "did you mean 'fairseq-train'"),
        ("ls -l", "no fairseq-train command; give one like"),
        ("torchrun --no-python bash -c 'exec fairseq-train \"$@\"' _ data --max-update 9",
         "no fairseq-train command outside quotes; give that one plain"),
        ("bash -c 'python -m fairseq_cli.train data'", "outside quotes"),
        ("python train.py --epochs 3", "no fairseq-train command"),
        ("", "no command given"),
    ],
)
def test_other_commands_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_command(shlex.split(text))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("fairseq-train d", "fairseq-train"),
        ("/venv/bin/fairseq-train d", "/venv/bin/fairseq-train"),
        ("python3.11 -m fairseq_cli.train d", "python3.11 -m fairseq_cli.train"),
        ("python train.py d", ""),
        ("python train.py d --arch x", "python train.py"),
        ("python ~/fairseq/train.py d", "python ~/fairseq/train.py"),
        ("srun -n 1 fairseq-train d", "srun -n 1 fairseq-train"),
        (
            "python -m torch.distributed.launch --nproc_per_node=2 /b/fairseq-train d",
            "python -m torch.distributed.launch --nproc_per_node=2 /b/fairseq-train",
        ),
    ],
)
def test_programs(text: str, program: str) -> None:
    if not program:
        with pytest.raises(UserError):
            parse_command(shlex.split(text))
        return
    command = parse_command(shlex.split(text))
    assert command.program == shlex.split(program)
    assert command.arguments[0] == "d"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("fairseq-train d", True),
        ("fairseq-trian d", True),  # the mistake is told, instead of "no recipe fairseq-trian"
        ("fairseq-hydra-train task.data=x", True),
        ("env CUDA_VISIBLE_DEVICES=0 fairseq-train d", True),
        ("A=1 env B=2 python -m fairseq_cli.train d", True),
        ("srun -n 1 fairseq-train d", True),
        ("torchrun --nproc-per-node 2 fairseq-train d", True),
        ("train.py d", True),
        ("demo-de-en nmt.steps=3", False),
        ("pythonic nmt.steps=3", False),
        ("A=1", False),
    ],
)
def test_a_command_is_told_from_a_recipes_name(text: str, is_one: bool) -> None:
    assert looks_like_training(shlex.split(text)) is is_one


def test_environment_prefixes() -> None:
    command = parse_command(["CUDA_VISIBLE_DEVICES=0,1", "env", "A=b c", "fairseq-train", "d"])
    assert command == FairseqCommand(
        {"CUDA_VISIBLE_DEVICES": "0,1", "A": "b c"}, ["fairseq-train"], ["d"]
    )


def test_shell_text_can_be_pasted_back() -> None:
    command = parse_command(
        ["A=b c", "fairseq-train", "my data", "--adam-betas", "(0.9, 0.98)", "--quote", "it's $5"]
    )
    assert parse_command(shlex.split(shell_text(command))) == command
    assert parse_script(shell_text(command), {}) == command


def test_getters() -> None:
    command = parse_command(shlex.split("fairseq-train d -a x --lr 1 --lr=2 --fp16 --save-dir s"))
    assert value_of(command, "--arch") == "x"
    assert value_of(command, "--lr") == "2"  # the last one counts, as in fairseq
    assert value_of(command, "--task") is None
    assert has_flag(command, "--fp16") and not has_flag(command, "--bf16")
    assert save_dir(command) == Path("s")
    assert value_of(with_value(command, "--lr", "3"), "--lr") == "3"
    assert save_dir(parse_command(["fairseq-train", "d"])) == Path("checkpoints")


def test_commands_are_understood_without_fairseq_and_torch() -> None:
    code = (
        "import sys; import l2t_fairseq.commands.taught, l2t_fairseq.commands.own_plugin; "
        "sys.exit(bool({'fairseq', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "plugins")}, check=False
    )
    assert done.returncode == 0
