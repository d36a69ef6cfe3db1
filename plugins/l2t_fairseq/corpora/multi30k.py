"""Multi30k, task 1, German and English: image captions, 29,000 training pairs.

Elliott et al. 2016, "Multi30K: Multilingual English-German Image Descriptions"; for research use.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.runs.download import OnEvent, fetch, refuse_no_folder
from l2t_fairseq.corpora.prepare import read_lines
from l2t_fairseq.corpora.segmentation import Corpus

BASE = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
# split -> official name; the checksums are of the uncompressed text, whoever packed it.
FILES = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
SHA256 = {
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
}


def read_multi30k(source_folder: Path | None, downloads: Path, on_event: OnEvent) -> Corpus:
    """Return the three splits, from ``source_folder`` or downloaded into ``downloads``.

    Raises:
        UserError: if a file is missing, cannot be fetched or is not the official text.
    """
    refuse_no_folder(source_folder)
    corpus: Corpus = {}
    for split, stem in FILES.items():
        german, english = (
            _side(f"{stem}.{language}", source_folder, downloads, on_event)
            for language in ("de", "en")
        )
        corpus[split] = (german, english)
    return corpus


def _side(
    name: str, source_folder: Path | None, downloads: Path, on_event: OnEvent
) -> list[str]:
    """Return the lines of one official file.

    Raises:
        UserError: as :func:`read_multi30k`.
    """
    if source_folder is not None:
        plain = source_folder / name
        return _checked_lines(plain if plain.exists() else source_folder / f"{name}.gz", name)
    path = fetch([f"{BASE}/{name}.gz"], downloads / f"{name}.gz", on_event, name=name)
    try:
        return _checked_lines(path, name)
    except UserError:
        path.unlink(missing_ok=True)  # or the next run would find the same damaged file
        raise


def _checked_lines(path: Path, name: str) -> list[str]:
    lines = read_lines(path)
    found = hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8")).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"{path} is not Multi30k's {name} ({len(lines)} lines, another checksum); get it again"
        )
    return lines
