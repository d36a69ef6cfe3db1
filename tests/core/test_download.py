"""The downloader against a real server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from l2t_core.errors import UserError
from l2t_core.runs.download import download
from l2t_core.runs.files import open_locked

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT: /whole knows ranges, /plain ignores them, /cut ends early the first time.

    /odd does not know how long it is.
    """

    ranges: list[str | None]
    cut_at: int | None

    def do_GET(self) -> None:
        if self.path not in ("/whole", "/plain", "/cut", "/odd"):
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        type(self).ranges.append(wanted)
        start = int(wanted[len("bytes=") : -1]) if wanted and self.path != "/plain" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", "abc" if self.path == "/odd" else str(len(body)))
        self.end_headers()
        if self.path == "/cut" and type(self).cut_at:
            body, type(self).cut_at = body[: type(self).cut_at], None
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.ranges, Handler.cut_at = [], 100_000
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_tells_its_progress(server: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download(
        f"{server}/whole",
        tmp_path / "new" / "file",
        sha256=SHA256,
        md5=MD5,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert path == tmp_path / "new" / "file" and path.read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["file"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)


def test_what_is_there_and_right_is_not_fetched_again(server: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(CONTENT)
    download(f"{server}/whole", target, sha256=SHA256)
    assert Handler.ranges == []
    target.write_bytes(CONTENT[:-1])
    download(f"{server}/whole", target, sha256=SHA256)
    assert Handler.ranges == [None] and target.read_bytes() == CONTENT


def test_a_broken_download_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(UserError, match=r"ended after 100000 of 512000 bytes.*go on"):
        download(f"{server}/cut", target, sha256=SHA256)
    assert names(tmp_path) == ["file.part"]
    seen: list[tuple[int, int | None]] = []
    download(
        f"{server}/cut",
        target,
        sha256=SHA256,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert Handler.ranges == [None, "bytes=100000-"]
    assert seen[0][0] > 100_000 and seen[-1] == (512_000, 512_000)
    assert target.read_bytes() == CONTENT and names(tmp_path) == ["file"]


@pytest.mark.parametrize("have", [1000, len(CONTENT)])
@pytest.mark.parametrize("address", ["whole", "plain"])
def test_parts_fit_any_server(server: str, tmp_path: Path, address: str, have: int) -> None:
    """One without ranges sends all again; one asked for more than there is answers 416."""
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    download(f"{server}/{address}", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]


def test_a_length_that_is_no_number_is_none(server: str, tmp_path: Path) -> None:
    totals: set[int | None] = set()
    target = tmp_path / "file"
    download(
        f"{server}/odd", target, sha256=SHA256, on_progress=lambda done, total: totals.add(total)
    )
    assert target.read_bytes() == CONTENT and totals == {None}


@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"md5": "0" * 32}])
def test_a_wrong_checksum_leaves_nothing(
    server: str, tmp_path: Path, expected: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="another checksum"):
        download(f"{server}/whole", tmp_path / "file", **expected)
    assert names(tmp_path) == []


def test_a_part_of_another_file_is_not_kept(server: str, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="another checksum"):
        download(f"{server}/whole", tmp_path / "file", sha256=SHA256)
    download(f"{server}/whole", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_address_that_does_not_exist(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answered 404.*--from"):
        download(f"{server}/nothing", tmp_path / "file")
    assert names(tmp_path) == []


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
        with pytest.raises(UserError, match=r"cannot download.*refused.*--from"):
            download(url, tmp_path / "file")
    assert names(tmp_path) == []


def test_a_server_that_does_not_speak_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"what?\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="cannot download"):
            download(f"http://127.0.0.1:{listener.getsockname()[1]}/file", tmp_path / "file")
        thread.join()


def test_a_target_that_cannot_be_written(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        download(f"{server}/whole", tmp_path / "file" / "inner")


def test_a_folder_of_the_files_name_is_told(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/file: Is a directory"):
        download(f"{server}/whole", tmp_path / "file", sha256=SHA256)


def test_two_commands_do_not_write_one_file(server: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    handle = open_locked(tmp_path / "file.part", os.O_WRONLY | os.O_CREAT)
    os.write(handle, CONTENT[:1000])
    with pytest.raises(UserError, match=r"another command is downloading .*file; wait for it"):
        download(f"{server}/whole", target, sha256=SHA256)
    os.close(handle)
    download(f"{server}/whole", target, sha256=SHA256)
    assert Handler.ranges == ["bytes=1000-"] and target.read_bytes() == CONTENT
