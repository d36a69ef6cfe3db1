"""Every mistake a user can make here is one line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import DIGITS, Run, write_teacher  # type: ignore[import-not-found]

from l2t_cli.errors import exit_code_of
from l2t_cli.recipe_reading.loading import load_recipe
from l2t_cli.recipe_reading.values import problems, without_idle


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainteacher"], "did you mean 'train-teacher'?"),
        (["recipes", "lss"], "did you mean 'ls'?"),
        (["train-teacher", "digits", "--drrun"], "did you mean '--dry-run'?"),
        (["train-teacher", "digits", "--frob"], "no option '--frob' (see `l2t train-teacher"),
        (["train-teacher", "digits", "--sed", "2"], "did you mean '--seed'?"),
        (["train-teacher", "digits", "--log-format", "jsn"], "did you mean 'json'?"),
        (["train-teacher", "digits", "--seed", "one"], "invalid value for '--seed'"),
        (["train-teacher"], "missing argument"),
        (["train-teacher", "digitss"], "no recipe 'digitss'; did you mean 'digits'?"),
        (["train-teacher", "nmt/demo-de-eng"], "did you mean 'nmt/demo-de-en'?"),
        (["train-teacher", "gone.yaml"], "no recipe file gone.yaml"),
        (["train-teacher", "digits", "trainin.episodes=3"], "did you mean 'training.episodes'?"),
        (["train-teacher", "digits", "image.step=3"], "did you mean 'image.steps'?"),
        (["train-teacher", "digits", "image.optimiser.l=3"], "'image.optimiser.lr'?"),
        (["train-teacher", "digits", "image.lr=3"], "did you mean 'image.optimiser.lr'?"),
        (["train-teacher", "digits", "training.lr=-1"], "error: the command line: training.lr is"),
        (["train-teacher", "digits", "training.hvp=x"], "error: the command line: training.hvp"),
        (["train-teacher", "demo-de-en", "nmt.measure=expected_blue"], "the command line: nmt.mea"),
        (["train-teacher", "demo-de-en", "nmt.candidates=bem"], "the command line: nmt.candidates"),
        (["train-teacher", "demo-de-en", "nmt.steps=0"], "the command line: nmt.steps is 0"),
        (["recipes", "validate", "digits", "image.steps=3"], "give it to a command with --dry-run"),
        (["compare", "digits", "compare.seeds=0"], "error: the command line: compare.seeds is"),
        (["train-teacher", "digits", "training.episodes=many"], "expected a whole number"),
        (["train-teacher", "digits", "training.episodes=2.5"], "expected a whole number"),
        (["train-teacher", "digits", "training.episodes=true"], "expected a whole number"),
        (["train-teacher", "digits", "image.optimiser.lr=fast"], "expected a number"),
        (["train-teacher", "digits", "image.optimiser=sgd"], "expected a section"),
        (["train-teacher", "digits", "teacher.features=progress"], "expected a list"),
        (["train-teacher", "digits", "image.optimiser.lr=.nan"], "is not a finite number"),
        (["train-teacher", "digits", "teacher.features=[1]"], "1, a whole number; expected a list"),
        (["compare", "digits", "compare.lr=[a,b]"], "'a', a text; expected a list of numbers"),
        (["compare", "digits", "compare.lr=[.1,.nan]"], "holds nan, no finite number"),
        (["compare", "digits", "compare.focal.gamma=[true]"], "a yes/no value; expected a list"),
        (["train-teacher", "digits", "image.folder=${HOME}/x"], "write the value itself"),
        (["train-teacher", "digits", "image.folder=${HOME"], "write the value itself"),
        (["train-teacher", "digits", "image.folder=${folder}"], "write the value itself"),
        (["train-teacher", "digits", "image.steps=${data}"], "write the value itself"),
        (["compare", "digits", "compare.losses=['${x}']"], "write the value itself"),
        (["train-teacher", "digits", f"image.hidden={10**20}"], "lie below 2^63"),
        # More than a process can address: what is less, a system that overcommits would grant.
        (["train-teacher", "digits", f"image.hidden={10**12}"], "256000000000000 bytes at once"),
        (["train-teacher", "digits", f"image.hidden={4 * 10**18}"], "a smaller batch or model"),
        (["train-teacher", "digits", "episodes"], "write key.sub=value"),
        (["train-teacher", "digits", "training.episodes=0"], "must be at least 1"),
        (["train-teacher", "digits", "loss.form=densee"], "did you mean 'dense'?"),
        (["train-teacher", "digits", "loss.sigma=softpls"], "did you mean 'softplus'?"),
        (["train-teacher", "digits", "teacher.name=attn"], "unknown teacher"),
        (["train-teacher", "digits", "image.optimiser.name=adm"], "did you mean 'adam'?"),
        (["train-teacher", "digits", "field=nmt"], "cannot be changed"),
        (["apply-teacher", "gone.safetensors", "digits"], "no teacher file at gone.safetensors"),
        (["apply-teacher", "gone.safetensors", "digits", "--seeds", "0"], "at least 1"),
        (["apply-teacher", "gone", "digits", "--seeds", "10001"], "at most 10,000"),
        (["apply-teacher", "gone", "digits", "--seed", "9" * 20], "--seed is 9999"),
        (["apply-teacher", "gone", "digits", "--seed", "-1"], "--seed is -1"),
        (["apply-teacher", "gone", "digits", "--seed", "2147483647", "--seeds", "2"], "2^31)"),
        (["inspect", "gone.safetensors"], "no teacher file"),
        (["train-teacher", "mnist-mlp"], "data/mnist"),
        (["train-teacher", "demo-de-en"], "no data folder data/demo"),
        (["train-teacher", "digits", "image.dev_size=0"], "image.dev_size"),
        (["train-teacher", "digits", "image.optimiser.lr=inf"], "must be above 0, but finite"),
        (["train-teacher", "digits", "image.optimiser.lr=1e39"], "numbers lie below 1e31"),
        (["compare", "digits", "compare.lr=[.1,1e300]"], "= [0.1, 1e+300] is too large for single"),
        (["train-teacher", "digits", "image.optimiser.eps=inf"], "must be 0 or more, but finite"),
        (["train-teacher", "digits", "teacher.init_scale=inf"], "must be 0 or more, but finite"),
        (["compare", "digits", "compare.lr=[.inf,1]"], "rates must be above 0, but finite"),
        (["train-teacher", "digits", "training.memory=x"], "the command line: training.memory='x'"),
        (["train-teacher", "digits", "training.memory=1e999GiB"], "'1e999GiB' is no size"),
        (
            ["train-teacher", "digits", "training.differentiation=windows"],
            "error: the command line: training.differentiation=windows needs training.window",
        ),
        (["apply-teacher", "digits", "a.safetensors"], "a.safetensors is a teacher's file and no"),
        (["compare", "a.safetensors", "digits"], "write `l2t apply-teacher TEACHER RECIPE` or"),
        (["data", "prepare", "mnst"], "did you mean 'mnist'?"),
        (["data", "prepare", "mnist", "--from", "nowhere"], "nowhere"),
        (["data", "prepare", "mnist", "--from", __file__], "is no folder"),
        (["data", "prepare", "multi30k", "--from", __file__], "is no folder"),
        (["data", "prepare", "iwslt14", "--from", "de-en.tgz"], "de-en.tgz is not there"),
        (["data", "prepare", "iwslt14", "--from", __file__], "no tar archive"),
    ],
)
def test_one_line_that_names_the_mend(l2t: Run, arguments: list[str], expected: str) -> None:
    assert expected in l2t(*arguments).error()
    assert not Path("runs").exists() and not Path("data").exists()


def test_a_gpu_without_room_is_one_line_and_other_failures_of_torch_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert exit_code_of(full) == 2 and exit_code_of(MemoryError()) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "(20.00 GiB at once)" in first and "training.memory" in first and "()" not in second
    for error in (RuntimeError("shapes cannot be multiplied"), KeyError("memory")):
        assert exit_code_of(error) is None
    assert capsys.readouterr().err == ""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_recipe_that_is_no_yaml_names_the_line(l2t: Run, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.yaml", "field: image\nimage:\n  steps: [1, 2\nloss: {}\n")
    line = l2t("train-teacher", broken).error()
    assert "broken.yaml line 4" in line and "not valid YAML" in line


@pytest.mark.parametrize(
    "text",
    ["a: " + "{a: " * 500 + "1" + "}" * 500, "a: " + "[" * 5000 + "]" * 5000, "image: &i {a: *i}"],
)
def test_sections_without_end_are_no_stack_trace(l2t: Run, tmp_path: Path, text: str) -> None:
    endless = write(tmp_path / "endless.yaml", f"field: image\n{text}\n")
    line = l2t("train-teacher", endless).error()
    # Older omegaconfs, as fairseq 0.12.2 brings, find what holds itself on their own.
    assert "endless.yaml" in line
    assert "sections lie in each other too deep" in line or "recursive node" in line


def test_two_documents_are_told_in_a_whole_sentence(l2t: Run, tmp_path: Path) -> None:
    two = write(tmp_path / "two.yaml", "field: image\n---\nfield: nmt\n")
    line = l2t("train-teacher", two).error()
    assert "line 2: not valid YAML: expected a single document in the stream, but found" in line


def test_a_recipe_that_is_no_utf_8(l2t: Run, tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("field: image\ndescription: größer\n".encode("latin-1"))
    for words in (["show", latin], ["cp", latin, "copy.yaml"], ["validate", latin]):
        line = l2t("recipes", *words).error()
        assert "latin.yaml is no UTF-8 text" in line and "save it as UTF-8" in line
    assert not Path("copy.yaml").exists()


def test_a_key_given_twice_is_an_error(l2t: Run, tmp_path: Path) -> None:
    twice = write(tmp_path / "twice.yaml", "field: image\nfield: image\n")
    assert "twice.yaml" in l2t("train-teacher", twice).error()


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "field: vision\n", "field: image\nimage: 3\n"])
def test_a_recipe_of_another_shape(l2t: Run, tmp_path: Path, text: str) -> None:
    assert "odd.yaml" in l2t("train-teacher", write(tmp_path / "odd.yaml", text)).error()


def test_validate_lists_all_errors_at_once(l2t: Run, digits: Path, tmp_path: Path) -> None:
    text = digits.read_text().replace("steps: 24", "stepz: 24").replace("lr: 0.003", "lr: fast")
    bad = write(tmp_path / "bad.yaml", text)
    outcome = l2t("recipes", "validate", bad, digits, "nonesuch")
    assert outcome.code == 2
    assert "tiny: ok" in outcome.out
    lines = outcome.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("l2t: error: ") for line in lines)
    assert "image.stepz" in lines[0] and "image.steps" in lines[0] and "bad.yaml" in lines[0]
    assert "training.lr" in lines[1] and "'fast'" in lines[1]
    assert "nonesuch" in lines[2]


def test_validate_names_a_reference(l2t: Run, digits: Path) -> None:
    digits.write_text(digits.read_text().replace("data: digits", 'folder: "${HOME}/x"'))
    line = l2t("recipes", "validate", digits).error()
    assert "tiny.yaml: image.folder = '${HOME}/x'" in line and "the value itself" in line


def test_validate_looks_into_teacher_files_and_modules(
    l2t: Run, digits: Path, tmp_path: Path
) -> None:
    damaged = write_teacher(tmp_path / "damaged.safetensors", 10, kind="classes")
    sound = write_teacher(tmp_path / "sound.safetensors", 10, kind="classes")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    teachers = f"compare: {{teachers: [{sound}, {damaged}, gone.safetensors]}}\n"
    bad = write(tmp_path / "bad.yaml", digits.read_text().replace("mlp", "gone:net") + teachers)
    lines = l2t("recipes", "validate", bad).err.splitlines()
    assert len(lines) == 3
    assert "image.model gone:net cannot be imported" in lines[0]
    assert "compare.teachers" in lines[1] and "damaged.safetensors" in lines[1]
    assert "compare.teachers" in lines[2] and "gone.safetensors" in lines[2]


def test_validate_looks_names_up(l2t: Run, digits: Path, tmp_path: Path) -> None:
    text = digits.read_text().replace("sigma: softplus", "sigma: softpluss")
    bad = write(tmp_path / "bad.yaml", text.replace("name: momentum", "name: momentun"))
    lines = l2t("recipes", "validate", bad).err.splitlines()
    assert len(lines) == 2
    assert "loss.sigma" in lines[0] and "did you mean 'softplus'?" in lines[0]
    assert "image.optimiser.name" in lines[1] and "did you mean 'momentum'?" in lines[1]


def test_an_output_folder_that_cannot_be_written(l2t: Run, digits: Path, tmp_path: Path) -> None:
    # A file in the way of the folder fails for every user, root too; a read-only folder does not.
    write(tmp_path / "file", "here")
    assert "file" in l2t("train-teacher", digits, "--out", tmp_path / "file").error()
    assert "file" in l2t("train-teacher", digits, "--out", tmp_path / "file" / "run").error()
    assert (tmp_path / "file").read_text() == "here"


def test_a_folder_of_other_files_is_refused(l2t: Run, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    write(folder / "letter.txt", "dear")
    assert "choose another --out" in l2t("train-teacher", digits, "--out", folder).error()
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "change",
    [
        "image.dev_size=0",
        "image.batch_size=-4",
        "training.episodes=-1",
        "image.optimiser.name=sgdd",
        "loss.warmup_steps=24",
        "teacher.features=[progress, dev_acuracy]",
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(l2t: Run, digits: Path, change: str) -> None:
    assert change.split("=")[0] in l2t("train-teacher", digits, change, "--dry-run").error()


def test_validate_refuses_impossible_settings(l2t: Run, digits: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.yaml", digits.read_text().replace("episodes: 2", "episodes: -1"))
    assert "training.episodes" in l2t("recipes", "validate", bad).error()


def test_validate_refuses_an_unknown_feature(l2t: Run, digits: Path) -> None:
    text = digits.read_text().replace("slots: 2", "slots: 2, features: [progress, dev_acuracy]")
    line = l2t("recipes", "validate", write(digits, text)).error()
    assert "teacher.features: " in line and "did you mean 'dev_accuracy'?" in line


MANY_CLASSES = """\
import torch

def load(folder, train):
    return torch.zeros(1001, 2, 2, dtype=torch.uint8), torch.arange(1001)
"""


def test_a_dry_run_refuses_a_dense_loss_of_too_many_classes(
    l2t: Run, digits: Path, tmp_path: Path
) -> None:
    write(tmp_path / "many_classes_here.py", MANY_CLASSES)
    changes = ["image.data=many_classes_here:load", "image.dev_size=400", "loss.form=dense"]
    line = l2t("train-teacher", digits, *changes, "--dry-run").error()
    assert "loss.form=dense is for pairs of classes, and 1001 have" in line
    assert l2t("train-teacher", digits, *changes[:2], "--dry-run").code == 0


def test_validate_refuses_a_dense_loss_over_the_dictionary_that_is_there(
    l2t: Run, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "words.yaml", "field: nmt\nnmt: {data: words}\nloss: {form: dense}\n")
    assert l2t("recipes", "validate", recipe).code == 0  # no data yet, so nothing is known of it
    data = tmp_path / "words" / "data-bin"
    data.mkdir(parents=True)
    for language, words in (("de", 2000), ("en", 1096)):
        write(data / f"dict.{language}.txt", "".join(f"w{i} 1\n" for i in range(words)))
    assert "is for pairs of classes, and 1100 have" in l2t("recipes", "validate", recipe).error()


@pytest.mark.parametrize("change", ["loss.form=dense", "teacher.slots=3", "training.lr=1"])
def test_an_application_refuses_what_belongs_to_the_teacher(l2t: Run, change: str) -> None:
    assert "no effect" in l2t("apply-teacher", "t.safetensors", "digits", change).error()


TAUGHT_BY_NOISE = "training: {differentiation: antithetic-es, perturbation: 0.05, lr: 0.01}"


@pytest.mark.parametrize(
    ("section", "changes", "left_out"),
    [
        (TAUGHT_BY_NOISE, ["training.differentiation=exact"], ["training.perturbation=0.05"]),
        ("loss: {form: lowrank, rank: 4}", ["loss.form=shared"], ["loss.rank=4"]),
        (
            "loss: {warmup_steps: 4, warmup_smoothing: 0.1}", ["loss.warmup_steps=0"],
            ["loss.warmup_smoothing=0.1"],
        ),
        ("teacher: {name: lstm, hidden: 4}", ["teacher.name=static"], ["teacher.hidden=4"]),
        ("training: {finalists: 2, final_students: 5}", ["training.finalists=1"],
         ["training.final_students=5"]),
        (
            "training: {differentiation: windows, window: 4}", ["training.differentiation=exact"],
            ["training.window=4"],
        ),
        ("", ["image.optimiser.name=sgd"], ["image.optimiser.momentum=0.8"]),
        (
            "training: {cotangent_cap: 5.0, discount: 0.9}",
            ["training.differentiation=antithetic-es", "image.optimiser.name=sgd"],
            ["training.discount=0.9", "training.cotangent_cap=5.0", "image.optimiser.momentum=0.8"],
        ),
    ],
)
def test_what_the_command_line_leaves_nothing_to_do_is_left_out(
    l2t: Run, digits: Path, section: str, changes: list[str], left_out: list[str]
) -> None:
    """As if it had been taken back on the command line, too; with a line on each."""
    kept = [line for line in digits.read_text().splitlines()
            if not line.startswith(("loss", "training", "teacher"))]
    kept = [line.replace("momentum: 0.9", "momentum: 0.8") for line in kept]
    write(digits, "\n".join([*kept, section, ""]))
    assert l2t("recipes", "validate", digits).code == 0
    done = l2t("train-teacher", digits, *changes, "--dry-run")
    assert done.code == 0, done.err
    notes = done.err.splitlines()
    assert [note.split(" has no effect with ")[0] for note in notes] == [
        f"note: {setting} of the recipe" for setting in left_out
    ]
    plain = load_recipe(str(digits), changes)
    whole, told = without_idle(plain)
    assert len(told) == len(left_out) and problems(whole) == []
    assert len(problems(plain)) >= 1
    given = l2t("train-teacher", digits, *changes, *left_out, "--dry-run").error()
    assert "the command line: " in given and "has no effect" in given


def test_what_stands_beside_its_reason_is_refused(l2t: Run, digits: Path) -> None:
    text = digits.read_text().replace("episodes: 2", "episodes: 2, perturbation: 0.05")
    write(digits, text)
    line = l2t("train-teacher", digits, "image.steps=16", "--dry-run").error()
    assert f"{digits}: training.perturbation has no effect" in line


def test_an_image_models_sizes_go_with_it() -> None:
    recipe = load_recipe("cifar10-wide-resnet", ["image.model=resnet8"])
    whole, told = without_idle(recipe)
    assert [text.split("=")[0] for text in told] == ["image.depth", "image.width"]
    assert (whole.student.depth, whole.student.width) == (0, 0) and problems(whole) == []


def test_a_comparison_and_an_application_leave_the_same_out(l2t: Run, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.safetensors", 10, kind="classes")
    recipe = write(tmp_path / "low.yaml", DIGITS.replace("momentum: 0.9", "momentum: 0.8"))
    for words in (("compare", recipe), ("apply-teacher", teacher, recipe)):
        done = l2t(*words, "image.optimiser.name=sgd", "--dry-run")
        assert done.code == 0, done.err
        assert done.err == (
            "note: image.optimiser.momentum=0.8 of the recipe has no effect with "
            "image.optimiser.name=sgd\n"
        )
