"""Images of people's own: a folder or a tar archive of one folder for each class."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from l2t_core.errors import UserError
from l2t_vision.data import image_folder
from l2t_vision.data.image_folder import load_image_folder
from l2t_vision.data.notes import notes
from l2t_vision.data.sets import load_data
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import build_student

COLOURS = np.random.default_rng(2).integers(0, 256, (20, 9, 8, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "l2t" / "images"


def picture(pixels: np.ndarray, kind: str = "png", mode: str | None = None) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(content, format=kind)
    return content.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Return a folder of 4 cats, 6 dogs (grey) and 3 of each for the test, 9 x 8 pixels."""
    folder = tmp_path / "pets"
    for split, name, count, first in (
        ("train", "dog", 6, 4),
        ("train", "cat", 4, 0),
        ("test", "cat", 3, 10),
        ("test", "dog", 3, 13),
    ):
        (folder / split / name).mkdir(parents=True)
        for number in range(count):
            pixels = COLOURS[first + number]
            content = picture(pixels[:, :, 0] if name == "dog" else pixels)
            (folder / split / name / f"{number:03}.png").write_bytes(content)
    (folder / "README.txt").write_text("cats and dogs")
    (folder / "train" / "cat" / "._000.png").write_bytes(b"left by a Macintosh")
    return folder


def packed(folder: Path, kind: str) -> Path:
    path = folder.parent / f"pets.tar{'.' + kind if kind else ''}"
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for split in ("test", "train"):
            archive.add(folder / split, f"./{split}")
    return path


def test_classes_in_order_of_name_and_grey_beside_colour(pets: Path) -> None:
    raw = load_image_folder(pets)
    assert raw.num_classes == 2 and raw.train_x.dtype == torch.uint8
    assert raw.train_x.shape == (10, 3, 9, 8) and raw.test_x.shape == (6, 3, 9, 8)
    assert raw.train_y.tolist() == [0] * 4 + [1] * 6 and raw.test_y.tolist() == [0] * 3 + [1] * 3
    assert np.array_equal(raw.train_x[2].permute(1, 2, 0).numpy(), COLOURS[2])
    for channel in raw.train_x[5]:
        assert np.array_equal(channel.numpy(), COLOURS[5][:, :, 0])


@pytest.mark.parametrize("kind", ["", "gz", "xz"])
def test_an_archive_gives_the_same(pets: Path, kind: str) -> None:
    folder, archive = load_image_folder(pets), load_image_folder(packed(pets, kind))
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(folder, name), getattr(archive, name))


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_a_damaged_archive_is_named(pets: Path, kind: str) -> None:
    archive = packed(pets, kind)
    content = bytearray(archive.read_bytes())
    content[40:140] = bytes(byte ^ 0xFF for byte in content[40:140])
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"pets\.tar\.\w\w (cannot be read|is neither)"):
        load_image_folder(archive)


CUT = r"pets\.tar is damaged or cut short .*; copy it again$"


def test_an_archive_that_is_cut_between_two_files_is_refused(pets: Path) -> None:
    archive = packed(pets, "")
    whole = archive.read_bytes()
    with tarfile.open(archive) as opened:
        *_, last, end = [member.offset for member in opened] + [opened.offset]
    assert whole[end:].count(0) == len(whole) - end
    for content in (whole[:last], whole[:end], whole[: end + 100]):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=CUT):
            load_image_folder(archive)
    archive.write_bytes(whole[:last] + b"x" * 512 + whole[last + 512 :])  # a header like no other
    with pytest.raises(UserError, match=CUT):
        load_image_folder(archive)
    archive.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(load_image_folder(archive).test_y) == 6


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_a_compressed_archive_without_its_last_bytes_is_refused(pets: Path, kind: str) -> None:
    archive = packed(pets, kind)
    archive.write_bytes(archive.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"or is cut short \(.*\); copy it again$"):
        load_image_folder(archive)


def test_grey_alone_has_one_channel(pets: Path) -> None:
    for split in ("train", "test"):
        for path in (pets / split / "cat").glob("0*.png"):
            path.write_bytes(picture(COLOURS[0], mode="1"))
    assert load_image_folder(pets).train_x.shape == (10, 1, 9, 8)


def test_names_with_a_dot_first_are_a_systems_own(pets: Path) -> None:
    """A file manager's thumbnails are no class, a notebook's copies no pictures, in no form."""
    whole = load_image_folder(pets)
    for place in ("train/.thumbs", "train/cat/.ipynb_checkpoints", ".cache/train/cow"):
        (pets / place).mkdir(parents=True)
        (pets / place / "000.png").write_bytes(picture(COLOURS[0]))
    for source in (pets, packed(pets, "")):
        raw = load_image_folder(source)
        assert raw.num_classes == 2 and torch.equal(raw.train_x, whole.train_x)


@pytest.mark.parametrize("kind", ["bmp", "ppm", "tiff", "webp"])
def test_other_formats_of_pictures_are_not_left_out(pets: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(COLOURS[9]).save(pets / "train" / "cat" / f"zoo.{kind}", **options)
    raw = load_image_folder(pets)
    assert len(raw.train_y) == 11
    assert np.array_equal(raw.train_x[4].permute(1, 2, 0).numpy(), COLOURS[9])


def test_what_is_left_out_is_told(pets: Path, cache: Path) -> None:
    """Whether it is decoded, cached or packed, and once a file has come to those in the cache."""
    assert load_image_folder(pets).notes == ()
    pages = [Image.fromarray(COLOURS[n]) for n in (1, 2)]
    for name in ("zoo.tif", "zoo.webp"):
        pages[0].save(pets / "train" / "dog" / name, save_all=True, append_images=pages[1:])
    pages[0].save(pets / "train" / "dog" / "phone.jpg", "MPO", save_all=True,
                  append_images=pages[1:])
    several = (
        "pictures of several pages or frames, of which the first is taken: 2 (train/dog/zoo.tif, "
        "...)"
    )
    assert load_image_folder(pets).notes == (several,)
    for split in ("train", "test"):
        pages[0].save(pets / split / "cat" / "old.GIF")
    (pets / "train" / "cat" / "NOTES").write_text("none")
    (pets / "train" / "labels.csv").write_text("none")
    kinds = "2 .gif, 1 no suffix; pictures are read from .jpg, .jpeg, "
    for source in (pets, pets, packed(pets, "")):
        raw = load_image_folder(source)
        assert raw.notes[0].startswith(f"files in classes' folders that are left out: {kinds}")
        assert raw.notes[1:] == (several,) and len(raw.train_y) == 13
    spec = ImageSpec(data="images", folder=str(pets), dev_size=4)
    assert notes(load_data(spec), own=True)[: len(raw.notes)] == [*raw.notes]


def test_a_name_that_is_not_utf8_is_told(pets: Path) -> None:
    for split in ("train", "test"):
        cat = os.fsencode(pets / split / "cat")
        try:
            os.rename(cat, cat[:-3] + b"caf\xe9")  # noqa: PTH104 - no text, so no Path
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
    for source in (pets, packed(pets, "")):
        with pytest.raises(UserError, match=r"the name of t\w+/caf\\xe9/000.png is not UTF-8"):
            load_image_folder(source)


def test_classes_of_any_name(pets: Path) -> None:
    before = load_image_folder(pets)
    for split in ("train", "test"):
        (pets / split / "cat").rename(pets / split / "ein Hündchen")
        (pets / split / "dog").rename(pets / split / "日本 犬")
    for source in (pets, packed(pets, "xz")):
        after = load_image_folder(source)
        assert torch.equal(before.train_y, after.train_y)
        assert torch.equal(before.train_x, after.train_x)


def test_jpeg_palette_and_transparency(pets: Path) -> None:
    cats = pets / "train" / "cat"
    (cats / "000.png").write_bytes(picture(COLOURS[0], mode="RGBA"))
    (cats / "001.png").write_bytes(picture(np.full((9, 8, 3), 102, np.uint8), mode="P"))
    (cats / "999.JPEG").write_bytes(picture(np.full((9, 8, 3), 200, np.uint8), "jpeg"))
    raw = load_image_folder(pets)
    assert np.array_equal(raw.train_x[0].permute(1, 2, 0).numpy(), COLOURS[0])
    assert raw.train_x[1].unique().tolist() == [102]
    assert raw.train_x[4].float().sub(200).abs().max() <= 2


def test_what_is_drawn_on_nothing_is_on_white(pets: Path) -> None:
    drawn = np.zeros((9, 8, 4), np.uint8)  # all black: the picture is in its transparency
    drawn[2:5, 1:7, 3] = 255
    cats = pets / "train" / "cat"
    Image.fromarray(drawn, "RGBA").save(cats / "000.png")
    grey = np.full((9, 8, 2), 40, np.uint8)
    grey[:, :4, 1], grey[:, 4:, 1] = 0, 255
    Image.fromarray(grey, "LA").save(cats / "001.png")
    raw = load_image_folder(pets)
    expected = np.where(drawn[:, :, 3] > 0, 0, 255)
    for channel in raw.train_x[0]:
        assert np.array_equal(channel.numpy(), expected)
    assert raw.train_x[1, 0, :, :4].unique().tolist() == [255]
    assert raw.train_x[1, 0, :, 4:].unique().tolist() == [40]


def test_a_camera_held_upright(pets: Path) -> None:
    """Its picture lies on the side; a note says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    path = pets / "train" / "cat" / "000.png"
    Image.fromarray(np.ascontiguousarray(np.rot90(COLOURS[3]))).save(path, exif=exif)
    found = load_image_folder(pets).train_x[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, COLOURS[3])


def test_a_class_that_cannot_be_read_is_not_left_out(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refusing(path: str) -> object:
        if os.fspath(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot be read .*Permission denied.*train/dog"):
        load_image_folder(pets)


def test_decoded_once_and_again_when_a_picture_changes(
    pets: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    whole = image_folder._decode

    def counting(content: bytes, name: str, size: int) -> np.ndarray:
        decoded.append(name)
        return whole(content, name, size)

    monkeypatch.setattr(image_folder, "_decode", counting)
    first = load_image_folder(pets)
    assert len(decoded) == 16 and len(list(cache.iterdir())) == 1
    again = load_image_folder(pets)
    assert len(decoded) == 16
    assert torch.equal(first.train_x, again.train_x) and again.num_classes == 2
    (pets / "train" / "cat" / "000.png").write_bytes(picture(COLOURS[19]))
    assert not torch.equal(load_image_folder(pets).train_x, first.train_x)
    assert len(decoded) == 32 and len(list(cache.iterdir())) == 2
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    changed = load_image_folder(pets)
    assert len(decoded) == 48
    for path in cache.iterdir():
        flipped = bytearray(path.read_bytes())
        flipped[-1] ^= 1  # one pixel or label, in a file that reads well
        path.write_bytes(flipped)
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(load_image_folder(pets), name), getattr(changed, name))
    assert len(decoded) == 64


def test_a_class_that_a_split_lacks_is_named(pets: Path, cache: Path) -> None:
    shutil.rmtree(pets / "test" / "dog")
    spec = ImageSpec(data="images", folder=str(pets), dev_size=4, model="mlp", batch_size=2)
    note = "there are no test images of 1 (dog) of 2 classes"
    assert note in build_student(spec).notes()
    assert note in build_student(spec).notes()  # out of the cache
    # What an earlier version has cached tells no names.
    (kept,) = cache.iterdir()
    save_file({**load_file(kept), "num_classes": torch.tensor(2)}, kept)
    assert note in build_student(spec).notes()
    assert load_image_folder(pets).class_names == ("cat", "dog")


def test_what_killed_writes_left_in_the_cache_is_swept(pets: Path, cache: Path) -> None:
    load_image_folder(pets)
    (kept,) = cache.iterdir()
    old, young = cache / f".{'0' * 64}.safetensors.x1_", cache / f".{kept.name}.abc"
    other = cache / ".nobody's"
    for path in (old, young, other):
        path.write_bytes(b"unfinished")
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    load_image_folder(pets, size=5)
    # Another process may be at the young one.
    assert not old.exists() and young.exists() and other.exists() and kept.exists()
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_without_a_place_for_the_cache(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert len(load_image_folder(pets).train_y) == 10


def test_images_of_any_size_are_cut_and_scaled_alike(pets: Path) -> None:
    striped = np.zeros((10, 30, 3), np.uint8)
    striped[:, 10:20] = 90  # the central square
    (pets / "train" / "cat" / "000.png").write_bytes(picture(striped))
    with pytest.raises(UserError, match=r"9 x 8 pixels and .* 10 x 30; set image\.size"):
        load_image_folder(pets)
    raw = load_image_folder(pets, size=5)
    assert raw.train_x.shape == (10, 3, 5, 5) and raw.train_x[0].unique().tolist() == [90]


def test_a_recipe_trains_on_them(pets: Path) -> None:
    settings = {"data": "images", "folder": str(packed(pets, "xz")), "dev_size": 4, "size": 8}
    data = load_data(ImageSpec(**settings))
    assert data.train_y.bincount().tolist() == [2, 4] and data.dev_y.bincount().tolist() == [2, 2]
    student = build_student(ImageSpec(**settings, model="resnet8", batch_size=3))
    log_probs, _ = student.predict(student.batch(0))
    assert log_probs.shape == (3, 2) and student.fingerprint()["num_classes"] == 2


def test_large_pictures_are_read_without_a_warning_and_huge_ones_refused(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9 * 8 - 1)  # Pillow warns above
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image_folder(pets, size=4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)  # and fails above twice as many
    with pytest.raises(UserError, match=r"png .*\(more than 70 pixels; scale it down\)"):
        load_image_folder(pets, size=5)


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_fill_it(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large = "pets: the pictures take more than half of this machine's memory"
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "_memory", lambda: 2 * 1000)  # of one 20 x 20 in colours: 1,200
        patch.setattr(image_folder, "_decode", None)
        with pytest.raises(UserError, match=f"{too_large}.*with an image.size below 20"):
            load_image_folder(pets, 20)
    monkeypatch.setattr(image_folder, "_memory", lambda: 2 * 1000)  # they have 2,160 bytes
    with pytest.raises(UserError, match=rf"{too_large}.*with image.size, such as"):
        load_image_folder(pets)
    assert load_image_folder(pets, 4).train_x.shape == (10, 3, 4, 4)


@pytest.mark.parametrize(
    "mishap, says",
    [
        ("damaged", r"train/cat/001.png is no picture that can be read"),
        ("cut", r"train/cat/001.png is no picture that can be read \(.*\); mend or remove it$"),
        ("sixteen bits", r"more than 8 bits"),
        ("other split", r"val/cat/000.png is not where an image is looked for"),
        ("no classes", r"train/000.png is not where an image is looked for"),
        ("no test", r"holds no test/CLASS"),
        ("other class", r"no train/cow for test/cow"),
        ("one class", r"holds one class only"),
        ("empty class", r"train/dog holds no picture \(.jpg, .*\); fill it, or remove that class"),
    ],
)
def test_what_cannot_be_used_is_named(pets: Path, mishap: str, says: str) -> None:
    victim = pets / "train" / "cat" / "001.png"
    if mishap == "damaged":
        victim.write_bytes(b"<html>")
    elif mishap == "cut":
        victim.write_bytes(victim.read_bytes()[:-60])
    elif mishap == "sixteen bits":
        victim.write_bytes(picture(np.full((9, 8), 3000, np.uint16)))
    elif mishap == "other split":
        (pets / "val").mkdir()
        (pets / "train" / "cat").rename(pets / "val" / "cat")
    elif mishap == "no classes":
        victim.rename(pets / "train" / "000.png")
    elif mishap == "no test":
        (pets / "test").rename(pets / ".test.old")
        for path in (pets / ".test.old").rglob("*.png"):
            path.unlink()
    elif mishap == "other class":
        (pets / "test" / "cat").rename(pets / "test" / "cow")
    else:
        for split in ("train", "test"):
            for path in (pets / split / "dog").iterdir():
                path.unlink()
            if mishap == "one class":
                (pets / split / "dog").rmdir()
    with pytest.raises(UserError, match=says) as raised:
        load_image_folder(pets)
    assert str(pets) in str(raised.value)


def test_neither_folder_nor_archive(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image folder or archive .*gone"):
        load_image_folder(tmp_path / "gone")
    with pytest.raises(UserError, match="neither a folder nor a tar archive"):
        load_image_folder(pets / "README.txt")
    archive = packed(pets, "xz")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_image_folder(archive)


def test_the_digest_of_a_folder_without_links_stays(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/a.b/1.png", "test/a/2.JPG", "train/a/.3.png", "notes.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(name.encode())
    # As published: what is cached is found again.
    key = image_folder._content_key(tmp_path / "set", 7)
    assert key == "6bc5f4146786b9d1df9b2f376813a7b9784c0451ff934d6ce72cf923b4f4264a"


def test_classes_and_pictures_behind_links_are_there(pets: Path, tmp_path: Path) -> None:
    whole = load_image_folder(pets)
    (pets / "train" / "dog").rename(tmp_path / "dogs")
    (pets / "train" / "dog").symlink_to(tmp_path / "dogs")
    (pets / "test" / "cat" / "000.png").rename(tmp_path / "cat.png")
    (pets / "test" / "cat" / "000.png").symlink_to(tmp_path / "cat.png")
    (pets / "train" / "cat" / "up").symlink_to(pets)  # a loop
    (tmp_path / "dogs" / "again").symlink_to(tmp_path / "dogs")
    linked = load_image_folder(pets)
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(whole, name), getattr(linked, name))
    assert linked.num_classes == 2


@pytest.mark.parametrize("place", ["train/emu", "train/cat/777.png", "test"])
def test_a_link_to_nothing_is_named(pets: Path, place: str) -> None:
    if place == "test":
        (pets / "test").rename(pets.parent / "old")
    (pets / "README").symlink_to("gone")  # nothing that is looked for
    (pets / place).symlink_to(pets / "gone")
    with pytest.raises(UserError, match=f"{place} is a link to nothing"):
        load_image_folder(pets)


def test_an_archive_refuses_symbolic_links_and_follows_hard_ones(pets: Path) -> None:
    whole = load_image_folder(pets)
    dogs = pets / "train" / "dog"
    (dogs / "006.png").hardlink_to(dogs / "000.png")
    raw = load_image_folder(packed(pets, "gz"))
    assert len(raw.train_y) == 11 and torch.equal(raw.train_x[10], whole.train_x[4])
    (pets / "train" / "emu").symlink_to(dogs)
    with pytest.raises(UserError, match=r"train/emu is a symbolic link; .*--dereference"):
        load_image_folder(packed(pets, "gz"))


@pytest.mark.parametrize("what", ["nothing", "animation", "folder", "animation in a folder"])
def test_a_class_without_pictures_is_refused_in_a_folder_and_in_an_archive(
    pets: Path, what: str
) -> None:
    cow = pets / "train" / "cow"
    inner = cow / "calves" if "folder" in what else cow
    inner.mkdir(parents=True)
    if "animation" in what:
        (inner / "000.gif").write_bytes(picture(COLOURS[0], "gif"))
    for source in (pets, packed(pets, "")):
        with pytest.raises(UserError, match=r"pets[^:]*: train/cow holds no picture \(\.jpg, "):
            load_image_folder(source)


def test_a_picture_that_was_packed_twice_counts_once_as_it_was_at_last(pets: Path) -> None:
    archive = packed(pets, "")
    with tarfile.open(archive, "a") as more:
        (pets / "train" / "cat" / "002.png").write_bytes(picture(COLOURS[17]))
        more.add(pets / "train" / "cat" / "002.png", "train/cat/002.png")
    folder, raw = load_image_folder(pets), load_image_folder(archive)
    assert torch.equal(raw.train_x, folder.train_x) and torch.equal(raw.train_y, folder.train_y)
    assert np.array_equal(raw.train_x[2].permute(1, 2, 0).numpy(), COLOURS[17])


def test_splits_one_folder_further_down_are_pointed_out(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    pets.rename(tmp_path / "outer" / "pets")
    with pytest.raises(UserError, match=r"set image\.folder to \S*/outer/pets$"):
        load_image_folder(tmp_path / "outer")
    archive = tmp_path / "pets.tar.gz"
    with tarfile.open(archive, "w:gz") as whole:
        whole.add(tmp_path / "outer" / "pets", "pets")
    with pytest.raises(UserError, match=r"\(tar -C pets -caf pets\.tar\.gz train test\)$"):
        load_image_folder(archive)
