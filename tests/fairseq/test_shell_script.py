"""Shell scripts with a fairseq-train command in them, read as the shell reads them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from l2t_core.errors import UserError
from l2t_fairseq.commands.train import parse_script, shell_text, without_exports

SCRIPT = r"""#!/usr/bin/env bash
set -e
# a comment that ends in a backslash \
DATA=data-bin/iwslt14   # where the data is
LR="5e-4"
LOG=~/logs
ARGS="--dropout 0.3 --weight-decay 0.0001"
ARGS+=" --seed 4"; ARGS+='' NEW+="--fp16-scale-window"
ARGS="$ARGS $NEW"
export SAVE=${OUT:-checkpoints}/$USER
fairseq-preprocess --source-lang de --destdir "$DATA"
echo "fairseq-train comes next"
CUDA_VISIBLE_DEVICES=0 fairseq-train \
    "$DATA" --arch=transformer_iwslt_de_en \
    --adam-betas '(0.9, 0.98)' --lr $LR $ARGS \
    --tensorboard-logdir $LOG/tb --wandb-project ~ --seen a~b '~/c' ~"/d" --finetune ~/"e f" \
    --user-note a\ b"c d" --max-up\
date 20000 \
    --save-dir $SAVE 2>&1 | tee "$SAVE/train.log"
fairseq-generate $DATA --path $(ls $SAVE | head -1)
"""


def test_a_script_is_read_as_the_shell_reads_it(tmp_path: Path) -> None:
    command = parse_script(SCRIPT, {"USER": "me", "HOME": "/home/of me"})
    assert command.environment == {"SAVE": "checkpoints/me", "CUDA_VISIBLE_DEVICES": "0"}
    assert command.left_out == ["2>&1", '| tee "$SAVE/train.log"']
    # The shell itself, with stand-ins on the PATH, is the judge.
    for name in ("fairseq-train", "fairseq-preprocess", "fairseq-generate", "tee", "ls", "head"):
        stand_in = tmp_path / name
        body = "cat" if name == "tee" else 'printf "%s\\n" "$@"' if name[8:] == "train" else ":"
        stand_in.write_text(f"#!/bin/sh\n{body}\n")
        stand_in.chmod(0o755)
    shell = subprocess.run(
        ["bash", "-c", SCRIPT],
        env={"USER": "me", "HOME": "/home/of me", "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [*shell.stdout.splitlines()[1:]] == command.arguments


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo hello", "holds no fairseq-train command"),
        ("fairseq-train a --max-update 1\nfairseq-train b", "holds 2 fairseq-train commands"),
        ("fairseq-train $1", r"'\$1'"),
        ("fairseq-train $NOWHERE", r"\$NOWHERE"),
        ("fairseq-train $(find . -name x)", "output of a command"),
        ("D=$(mktemp -d)\nfairseq-train $D", "output of a command"),
        ('fairseq-train "${ARGS[@]}"', "ARGS"),
        ("ARGS=(--lr 1  # don't\n --seed 2)\nfairseq-train d $ARGS", "ARGS an array"),
        ("ARGS=1\nARGS+=(--lr 1)\nfairseq-train d $ARGS", "ARGS an array"),
        ("A=$1\nA+=2\nfairseq-train d $A", r"'\$1'"),
        ("for s in 1 2; do\n  fairseq-train d --seed $s\ndone", r"\$s"),
        ("s=3\nfor s in 1 2; do fairseq-train d --seed $s; done", "in a loop"),
        ("if true; then while true\ndo\nfairseq-train d\ndone; fi", "in a loop"),
        ("fairseq-train d --adam-betas $'(0.9, 0.98)'", "before a quote"),
        ("fairseq-train ~/d", r"\$HOME"),
        ("cd /somewhere && fairseq-train d", "changes folder"),
        ("fairseq-train 'd", "never closed"),
        ("fairseq-hydra-train task.data=x", "not supported yet"),
    ],
)
def test_scripts_that_cannot_be_read_are_refused(script: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_script(script, {})
    assert "\n" not in str(caught.value)


TRAIN = "fairseq-train data --arch transformer --max-update 9"


@pytest.mark.parametrize(
    "script",
    [
        f"cat > notes <<EOF\nDon't run fairseq-train other\nEOF\n{TRAIN}\n",
        f"cat <<-END <<'B' | tee log\nit's\n\t\"END\n\tEND\n\"\nB\n{TRAIN} <<< word\n",
        f"srun python - <<'PY' > out && {TRAIN}\nprint(\"it's\")\nPY\n",
        f"cat <<\\EOF\nfairseq-train other\nEOF\n{TRAIN}\n",
        f"echo word | tee <<< EOF\n(( N = 1 << 3 ))\n{TRAIN}\n",
        f"N=3\nsbatch --gpus $N \\\n --time 9 <<EOF\n#!/bin/bash\n#SBATCH -t 9\n{TRAIN}\nEOF\n",
        f"cat > job.sh <<EOF\n{TRAIN}\nEOF\nsbatch job.sh\n",
        f"bash<<EOF\n{TRAIN}\nEOF\n",
    ],
)  # fmt: skip
def test_here_documents_are_text_unless_the_command_is_in_one(script: str) -> None:
    command = parse_script(script, {})
    assert command.arguments == TRAIN.split()[1:]


@pytest.mark.parametrize(
    "mention",
    [
        "mkdir -p runs/fairseq-train",
        "mkdir -p runs/fairseq-train runs/logs",
        "[ -d runs/fairseq-train ] || rm -r fairseq-train/old 2> /dev/null",
        "log_to runs/fairseq-train",
        "tail -f fairseq-train &",
        "command -v fairseq-train > /dev/null",
    ],
)
def test_a_name_like_the_commands_is_no_second_one(mention: str) -> None:
    assert parse_script(f"{mention}\nsrun -n 1 {TRAIN}\n", {}).arguments == TRAIN.split()[1:]


def test_what_does_not_matter_to_the_command_may_be_unknown() -> None:
    script = "for i in 1 2; do echo $i; done\nN=$(nproc)\nmkdir $UNSET\n"
    script += "RUN=(fairseq-train other) A=$1 B=2\n"
    script += "fairseq-train d --lr 1; rm -r $ALSO_UNSET"
    assert parse_script(script, {}).arguments == ["d", "--lr", "1"]


USES = "fairseq-train data --lr $LR"


@pytest.mark.parametrize(
    "script",
    [
        f"LR=1\n(LR=2; echo)\n{USES}",
        f"LR=1\n( (LR=2) && LR=3 | cat )\nN=$((4 * (5 + 1)))\n{USES}",
        f"LR=1\nif true; then LR=2; {USES}; fi\nLR=3",
        f"LR=1\nif false; then LR=2; else {USES}; fi",
        f"LR=1\nif false; then LR=2; elif false || true; then LR=3\n{USES}\nfi",
        f"if true\nthen\n  LR=2\nfi; LR=1\n{USES}",
        f"case x in a|b) LR=1;; (x) LR=2; {USES};; esac",
        f"LR=2 &&\n{USES}",
        f"export A=1 && LR=2\n{USES}",
        f"true && LR=2 && {USES} || LR=3",
        f"train() {{\nLR=2\n{USES}\n}}\ntrain",
        f"for n in 1 2; do echo $n; done\nLR=2\n{USES}",
        f"echo | while read LR; do LR=2; done\nLR=4; {USES} && LR=5",
        f"LR=1; [ -d / ] && echo || echo; {USES}",
        f"echo 1 | tee ';' \"a;b\" | cat > /dev/null # don't\nLR=2; {USES}",
    ],
)
def test_a_variable_is_known_in_its_block_and_where_it_is_set_anew(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "fairseq-train").write_text('#!/bin/sh\nprintf "%s " "$@"\n')
    (tmp_path / "fairseq-train").chmod(0o755)
    shell = subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True,
        check=True, text=True,
    )  # fmt: skip
    assert shell.stdout.split()[-3:] == parse_script(script, {}).arguments


@pytest.mark.parametrize(
    "script",
    [
        "if [ $1 = big ]; then LR=2; fi",
        "if true; then if true; then LR=2; fi; LR=3; fi",
        "if true; then LR=2; else LR=3; fi",
        "[ -n \"$BIG\" ] && LR=2 || LR=3",
        "[ -n \"$BIG\" ] ||\n LR=2",
        "[ -n \"$BIG\" ] && (true) &&\n LR=2",
        "case $1 in big) LR=2;; *) ;; esac",
        "case $1 in big|huge) LR=2;;\n*) echo;;\nesac",
        "for LR in 1 2; do echo; done",
        "while true; do LR=2; break; done",
        "ls | while read n; do LR=2; done",
        "train() { LR=2; }",
        "function train {\nLR=2\n}",
        "if true; then (ls | wc -l)\nLR=2; fi",
        "if true; then export LR=2; fi",
        "if true; then LR+=2; fi",
        "true || LR=2 && ",
    ],
)
def test_a_variable_that_may_be_set_is_not_known(script: str) -> None:
    script = f"LR=1\n{script}"
    script += "" if script.endswith("&& ") else "\n"
    with pytest.raises(UserError, match=r"sets \$LR in a .* only a running shell"):
        parse_script(script + USES, {})
    assert parse_script(script + TRAIN, {}).arguments == TRAIN.split()[1:]


EXPORTS = r"""
A=0
export A=1 B C="it's $A"
B=2; LATER=3
declare -x D=4 && readonly E=5
typeset -x F; F=6
GIVEN=new
export "G=$A  two" 'H=$A' "$NOTHING"
export A=one UNKNOWN=$(date)
declare -i N=4
PREFIX=7 B=two fairseq-train data "$E" $LATER
export TOO_LATE=8
"""


def test_what_a_script_exports_is_the_commands_environment(tmp_path: Path) -> None:
    given = {"GIVEN": "old", "KEPT": "same"}
    command = parse_script(EXPORTS, given)
    assert list(command.environment) == [*"ABCDF", "GIVEN", *"GH", "PREFIX"]
    assert command.left_out == ["export UNKNOWN"]
    # What the command has in front is its own; the rest may be another shell's (PATH=bin:$PATH).
    own = shell_text(without_exports(command))
    assert own == "B=two PREFIX=7 fairseq-train data 5 3"
    (tmp_path / "fairseq-train").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "fairseq-train").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    said = subprocess.run(
        ["bash", "-c", EXPORTS], env={**given, "PATH": path}, capture_output=True, check=True,
        text=True,
    ).stdout  # fmt: skip
    shell = dict(line.split("=", 1) for line in said.splitlines())
    own = {name: shell[name] for name in shell if len(name) == 1 and name != "_"}
    assert {**own, "GIVEN": "new", "PREFIX": "7"} == command.environment
    assert shell["GIVEN"] == "new" and shell["PREFIX"] == "7" and "LATER" not in shell
