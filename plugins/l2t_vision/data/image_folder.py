"""People's own images: ``<split>/<class>/*.jpg`` and the like, in a folder or a tar archive.

Decoded once: the result is kept as unsigned bytes in the cache folder of the user's account, under
a name that is the digest of all file names and contents, so that a changed picture is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.runs.files import DAMAGED, atomic_write, file_digest, sweep
from l2t_core.runs.tensor_digest import tensor_digest
from l2t_vision.data.raw import ImagesAndLabels, RawImages, checked_splits

# Those that torchvision's ImageFolder takes for pictures.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "test")
# Of the cached file and of the way to decode: an archive's links and empty classes were once left
# out without a word, a file that was packed twice counted twice, and cut archives were taken.
_FOLDER_FORMAT, _ARCHIVE_FORMAT = "3", "6"

Pictures = dict[tuple[str, str], np.ndarray]  # by class and name, as _decode returns them
_TENSORS = ("train_x", "train_y", "test_x", "test_y")  # of RawImages


def load_image_folder(source: Path, size: int = 0) -> RawImages:
    """Return the images under ``source``, a folder or a tar archive, classes in order of name.

    Grey images are [N, 1, H, W]; where one has colours all are [N, 3, H, W]. With ``size`` each is
    cut to its central square and scaled to ``size`` x ``size`` pixels.

    Raises:
        UserError: if there is no such thing, it has another layout, a picture is damaged, the
            pictures differ in size and ``size`` is 0, or they are too large for the memory.
    """
    try:
        cache = _cache_folder() / f"{_content_key(source, size)}.safetensors"
        cached = _load(cache)
        if cached is not None:
            return cached
        raw = _decode_all(source, size)
    except DAMAGED as error:
        mend = "" if isinstance(error, OSError) else "; copy it again"
        raise UserError(f"{source} cannot be read or is cut short ({error}){mend}") from error
    _save(cache, raw)
    return raw


def _files(source: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Yield every picture's path, down from its split, and its content.

    So are other files in classes' folders, with None: they are left out.

    Raises:
        UserError: at the end, if a class of train is without pictures.
    """
    filled: dict[str, bool] = {}
    for path, content in (_in_folder if source.is_dir() else _in_archive)(source):
        split, name = (*path.parts, "", "")[:2]
        if split == "train" and name:
            filled[name] = filled.get(name, False) or content is not None
        if content is not None or _is_in_class(path):
            yield path, content
    for name in sorted(name for name, pictures in filled.items() if not pictures):
        raise UserError(
            f"{source}: train/{name} holds no picture ({', '.join(SUFFIXES)}); fill it, or remove "
            "that class"
        )


def _in_folder(source: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Yield what is in the folder ``source`` as :func:`_files`, and classes' folders with None."""
    for found in sorted(_found(source)):
        path = PurePosixPath(found.relative_to(source).as_posix())
        picture = _is_picture(path) and found.is_file()
        yield path, found.read_bytes() if picture else None


def _in_archive(source: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Yield what is in the archive ``source`` as :func:`_files`, and classes' folders with None."""
    if not source.is_file():
        raise UserError(
            f"no image folder or archive {source}; give image.folder one that holds "
            "train/CLASS/*.jpg and test/CLASS/*.jpg"
        )
    if not tarfile.is_tarfile(source):
        raise UserError(f"{source} is neither a folder nor a tar archive (.tar, .tar.gz, .tar.xz)")
    with tarfile.open(source) as archive:
        for member in archive:
            path = PurePosixPath(member.name.removeprefix("./"))
            inside = path.parts[:1] in [(split,) for split in SPLITS]
            if member.issym() and inside and not _hidden(path):
                raise UserError(
                    f"{source}: {path} is a symbolic link; pack what it points to "
                    "(tar --dereference)"
                )
            if _hidden(path):
                continue
            # A hard link stands for a file that is packed further up.
            if not (member.isfile() or member.islnk()):
                if member.isdir() and inside:
                    yield path, None
            elif _is_picture(path):
                handle = archive.extractfile(member)
                assert handle is not None  # it is a file
                yield path, handle.read()
            elif _is_in_class(path):
                yield path, None
        _refuse_cut_short(source, archive)


def _refuse_cut_short(source: Path, archive: tarfile.TarFile) -> None:
    """Refuse an ``archive``, read through, that does not end with its closing block of zeros.

    tarfile takes the end of the file, and a damaged header, for the archive's end. What is behind
    is read because a compressed file has its checksum there.
    """
    stream = archive.fileobj
    assert stream is not None  # it is open
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{source} is damaged or cut short (it lacks a tar archive's end); copy it again"
        )
    while stream.read(1 << 20):
        pass


def _found(source: Path) -> Iterator[Path]:
    """Yield the pictures under the folder ``source``, what else is in classes' folders, and those.

    Links are followed.

    Raises:
        UserError: if a split, a class or a picture is a link to nothing.
        OSError: if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    above = {source: {os.path.realpath(source)}}  # of each folder, itself and those it lies in
    for place, folders, files in os.walk(source, onerror=refuse, followlinks=True):
        here = Path(place)
        around = above.pop(here)
        for name in list(folders):
            real = os.path.realpath(here / name)
            if real in around or _hidden(PurePosixPath(name)):
                folders.remove(name)  # a link back up holds nothing new
            else:
                above[here / name] = around | {real}
        if here == source / "train":
            yield from (here / name for name in folders)
        for path in (here / name for name in files if not _hidden(PurePosixPath(name))):
            if path.is_file():
                if _is_picture(path) or _is_in_class(path.relative_to(source)):
                    yield path
                continue
            parts = path.relative_to(source).parts
            wanted = parts[0] in SPLITS and (len(parts) <= 2 or _is_picture(path))
            if path.is_symlink() and wanted:
                raise UserError(f"{path} is a link to nothing; mend or remove it")


def _is_picture(path: PurePosixPath | Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_in_class(path: PurePosixPath | Path) -> bool:
    return len(path.parts) > 2 and path.parts[0] in SPLITS


def _hidden(path: PurePosixPath) -> bool:
    """Tell whether ``path``, below the data's own folder, or one around it starts with a dot.

    Such names are a system's own: the Macintosh's ._IMG.jpg, an editor's copies.
    """
    return any(part.startswith(".") for part in path.parts)


def _content_key(source: Path, size: int) -> str:
    packed = source.is_file()
    form = _ARCHIVE_FORMAT if packed else _FOLDER_FORMAT
    digest = hashlib.sha256(f"{form} {size} ".encode())
    if packed:
        digest.update(file_digest(source, "sha256").encode())
    else:
        for path, content in _files(source):
            if content is None:
                digest.update(os.fsencode(path) + b"\0left out")
                continue
            _refuse_other_than_utf8(source, path)
            digest.update(str(path).encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _refuse_other_than_utf8(source: Path, path: PurePosixPath) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UserError(f"{source}: the name of {shown} is not UTF-8; rename it") from None


def _decode_all(source: Path, size: int) -> RawImages:
    found: dict[str, Pictures] = {split: {} for split in SPLITS}
    shapes: dict[tuple[int, ...], PurePosixPath] = {}
    left_out: Counter[str] = Counter()
    several: list[PurePosixPath] = []
    held = 0
    for path, content in _files(source):
        if content is None:
            left_out[path.suffix.lower() or "no suffix"] += 1
            continue
        _refuse_other_than_utf8(source, path)
        if len(path.parts) != 3 or path.parts[0] not in SPLITS:
            raise UserError(_misplaced(source, path))
        _refuse_more_than_memory(source, size, held + 3 * size**2)  # if it is coloured
        pixels, more = _decode(content, f"{source}: {path}", size)
        held += pixels.nbytes
        several += [path] if more else []
        shapes.setdefault(pixels.shape[:2], path)
        if len(shapes) > 1:
            (first, one), (second, other) = list(shapes.items())[:2]
            raise UserError(
                f"{source}: {one} has {first[0]} x {first[1]} pixels and {other} {second[0]} x "
                f"{second[1]}; set image.size to cut and scale them alike"
            )
        # Of a file that was packed twice the later one counts, as where it is unpacked.
        found[path.parts[0]][path.parts[1], path.parts[2]] = pixels
    for split in SPLITS:
        if not found[split]:
            raise UserError(f"{source} holds no {split}/CLASS/*.jpg, *.png or the like")
    return dataclasses.replace(_assemble(source, found), notes=_notes(left_out, several))


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _refuse_more_than_memory(source: Path, size: int, held: int) -> None:
    """Refuse pictures of ``held`` bytes: what ends a process for want of memory says nothing."""
    if 2 * held > _memory():  # they are there twice when they are put together
        mend = f"an image.size below {size}" if size else "image.size, such as image.size=64"
        raise UserError(
            f"{source}: the pictures take more than half of this machine's memory, "
            f"{_memory() / 2**30:.1f} GiB, as bytes; scale them down with {mend}"
        )


def _misplaced(source: Path, path: PurePosixPath) -> str:
    """Say that the picture ``path`` is not in a class of a split, and what to do."""
    top, below = (*path.parts, "", "")[:2]
    mend = "dev images belong to train, dev is cut from it"
    if top not in (*SPLITS, "/") and below in SPLITS:
        pack = f"pack what is in {top}, without it (tar -C {top} -caf {source.name} train test)"
        mend = f"set image.folder to {source / top}" if source.is_dir() else pack
    return (
        f"{source}: {path} is not where an image is looked for: train/CLASS/NAME or "
        f"test/CLASS/NAME; {mend}"
    )


def _notes(left_out: Counter[str], several: Sequence[PurePosixPath]) -> tuple[str, ...]:
    """Return a line on what is left out of files, by suffix, and one on that of pictures."""
    notes = []
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
        notes.append(
            f"files in classes' folders that are left out: {kinds}; pictures are read from "
            f"{', '.join(SUFFIXES)}"
        )
    if several:
        notes.append(
            f"pictures of several pages or frames, of which the first is taken: {len(several)} "
            f"({several[0]}{', ...' if several[1:] else ''})"
        )
    return tuple(notes)


def _assemble(source: Path, found: dict[str, Pictures]) -> RawImages:
    classes = sorted({name for name, _ in found["train"]})
    unknown = sorted({name for name, _ in found["test"]} - set(classes))
    if unknown:
        raise UserError(f"{source}: no train/{unknown[0]} for test/{unknown[0]}")
    colour = any(pixels.ndim == 3 for images in found.values() for pixels in images.values())
    splits: list[ImagesAndLabels] = []
    for split in SPLITS:
        images = found.pop(split)
        order = sorted(images)  # whatever an archive's
        pixels = torch.stack([_channels_first(images[place], colour) for place in order])
        splits.append((pixels, torch.tensor([classes.index(name) for name, _ in order])))
    train, test = splits
    return checked_splits(source, train, test, len(classes), tuple(classes))


def _channels_first(pixels: np.ndarray, colour: bool) -> Tensor:
    tensor = torch.from_numpy(pixels)
    if tensor.ndim == 3:
        return tensor.permute(2, 0, 1).contiguous()
    return tensor.expand(3 if colour else 1, *tensor.shape).contiguous()


def _decode(content: bytes, name: str, size: int) -> tuple[np.ndarray, bool]:
    """Return a picture as unsigned bytes, [H, W] if it is grey, else [H, W, 3].

    And whether its file holds more than that, a document's pages or an animation's frames.
    """
    try:
        with _large_pictures(), Image.open(io.BytesIO(content)) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits for each colour; save it with 8")
            # Not a camera's MPO: what it adds is the same picture, smaller or from beside.
            several = getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
            picture: Any = ImageOps.exif_transpose(opened)  # as its camera was held
            grey = picture.mode in ("1", "L", "LA")
            if "A" in picture.getbands() or "transparency" in picture.info:
                # Drawn on nothing: as on paper.
                picture = picture.convert("RGBA")
                paper = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(paper, picture)
            picture = picture.convert("L" if grey else "RGB")
        if size:
            side = min(picture.size)
            left, top = ((length - side) // 2 for length in picture.size)
            picture = picture.crop((left, top, left + side, top + side))
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        return np.array(picture), several
    # Pillow fails on damaged pictures in many ways, SyntaxError among them.
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        why = "of no known format, or damaged" if unknown else str(error)
        raise UserError(
            f"{name} is no picture that can be read ({why}); mend or remove it"
        ) from error


@contextlib.contextmanager
def _large_pictures() -> Iterator[None]:
    """Take pictures as large as Pillow does, without its warning; word what it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"more than {most:,} pixels; scale it down") from None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "l2t" / "images"


def _load(cache: Path) -> RawImages | None:
    """Return what is cached; a damaged file, or one of an earlier version, counts as none."""
    try:
        with safetensors.safe_open(cache, framework="pt") as kept:
            texts = kept.metadata() or {}
            names, notes = (tuple(json.loads(texts[key])) for key in ("class_names", "notes"))
            tensors = {name: kept.get_tensor(name) for name in _TENSORS}
        if texts["sha256"] != tensor_digest(tensors, texts["class_names"] + texts["notes"]):
            return None
        return RawImages(**tensors, num_classes=len(names), class_names=names, notes=notes)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _save(cache: Path, raw: RawImages) -> None:
    tensors = {name: getattr(raw, name) for name in _TENSORS}
    texts = {"class_names": json.dumps(raw.class_names), "notes": json.dumps(raw.notes)}
    texts["sha256"] = tensor_digest(tensors, texts["class_names"] + texts["notes"])
    # Without room or permission the images are decoded again next time.
    with contextlib.suppress(UserError, OSError):
        atomic_write(cache, safetensors.torch.save(tensors, texts))
        # Of whatever pictures: those that were changed since are asked for no more.
        unfinished = (left.name.split(".") for left in cache.parent.glob(".*.safetensors.*"))
        sweep(cache.parent, [cache.with_stem(stem) for _, stem, *_ in unfinished])
