"""What counts as the code of a function of the user's own: its file, and what that imports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from l2t_core.user_code import source_of

FILES = {
    "own_code.py": "from own_part import half\nfrom own_pack import inner\n\n\ndef loss(): ...\n",
    "own_part.py": "import os\nimport own_last.leaf\nhalf = 0.5\n",
    "own_last/leaf.py": "def late():\n    import own_late\n",
    "own_late.py": "late = 1\n",
    "own_pack/__init__.py": "",
    "own_pack/inner.py": "from . import other\nfrom .other import x\nimport torch, l2t_core\n",
    "own_pack/other.py": "x = 1\n",
    "own_lone.py": "import torch\nimport json\n\n\ndef loss(): ...\n",
    "json.py": "what = 'has the name of a standard module'\n",
    "beside.py": "nobody = 'imports this'\n",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name, text in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_code_that_imports_nothing_beside_it_is_its_file() -> None:
    assert source_of("own_lone:loss", "image.model") == FILES["own_lone.py"].encode()
    assert source_of("torch:zeros", "image.model") == source_of("torch:ones", "image.model")
    installed = Path(str(importlib.import_module("torch.nn.functional").__file__))
    assert source_of("torch.nn.functional:mse_loss", "image.model") == installed.read_bytes()


@pytest.mark.parametrize(
    ("changed", "counts"),
    [(name, name not in ("beside.py", "json.py", "own_lone.py")) for name in FILES],
)
def test_what_it_imports_counts_however_far_and_nothing_else(changed: str, counts: bool) -> None:
    before = source_of("own_code:loss", "image.model")
    assert before.startswith(FILES["own_code.py"].encode())
    assert before == source_of("own_code:loss", "image.model")
    Path(changed).write_text(FILES[changed] + "more = 1\n")
    assert (source_of("own_code:loss", "image.model") != before) == counts


def test_a_module_of_a_package_knows_the_others_and_the_package() -> None:
    Path("own_pack/inner.py").write_text(FILES["own_pack/inner.py"] + "def net(): ...\n")
    before = source_of("own_pack.inner:net", "image.model")
    for name in ("own_pack/other.py", "own_pack/__init__.py"):
        Path(name).write_text(FILES[name] + "more = 1\n")
        assert source_of("own_pack.inner:net", "image.model") != before
        before = source_of("own_pack.inner:net", "image.model")


def test_what_the_named_module_takes_from_elsewhere_is_known_in_both() -> None:
    Path("own_wrap.py").write_text("from own_lone import loss\n")
    before = source_of("own_wrap:loss", "image.model")
    for name in ("own_lone.py", "own_wrap.py"):
        Path(name).write_text(Path(name).read_text() + "more = 1\n")
        assert source_of("own_wrap:loss", "image.model") != before
        before = source_of("own_wrap:loss", "image.model")


def test_a_neighbour_that_is_not_python_is_no_stack_trace() -> None:
    before = source_of("own_code:loss", "image.model")
    Path("own_late.py").write_bytes(b"\xe4 is no UTF-8 (")
    assert source_of("own_code:loss", "image.model") != before
