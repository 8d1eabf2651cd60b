"""recipes/archives.py: downloads that go on where they broke off, checksums, and what comes out of an archive."""

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from recipe_scripts import RECIPES, assert_one_sentence

DATA = bytes(range(256)) * 500


class Server(ThreadingHTTPServer):
    """Serves DATA under every name; the first `breaks` answers break off in the middle."""

    breaks = 0
    ranges = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        start = 0
        if self.server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if self.path.endswith("missing.tgz") or start >= len(DATA):
            self.send_response(416 if start else 404)
            self.send_header("Content-Range", f"bytes */{len(DATA)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        end = len(DATA)
        if self.server.breaks:
            self.server.breaks -= 1
            end = (start + len(DATA)) // 2
        self.wfile.write(DATA[start:end])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def archives(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / "archives.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def get(server: Server, output: Path, *arguments: object, name: str = "a.tgz") -> subprocess.CompletedProcess[str]:
    return archives("get", "--output", output, *arguments, f"http://127.0.0.1:{server.server_address[1]}/x/{name}")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.breaks = 1
    server.ranges = ranges
    done = get(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.tgz").read_bytes() == DATA
    assert (tmp_path / "SHA256SUMS").read_text() == f"{hashlib.sha256(DATA).hexdigest()}  a.tgz\n"
    assert not (tmp_path / "a.tgz.part").exists()


@pytest.mark.parametrize("size", [1000, len(DATA)])
def test_what_an_earlier_run_has_left_is_used(server: Server, tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tgz.part").write_bytes(DATA[:size])
    assert get(server, tmp_path).returncode == 0
    assert (tmp_path / "a.tgz").read_bytes() == DATA


def test_what_is_there_is_not_downloaded_again_and_must_be_the_same(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path)
    server.breaks = 1
    assert "downloading" not in get(server, tmp_path).stdout
    assert server.breaks == 1
    (tmp_path / "a.tgz").write_bytes(b"another file")
    assert_one_sentence(get(server, tmp_path), "a.tgz", "SHA256SUMS")


def test_what_is_not_there_is_said_to_be_so(server: Server, tmp_path: Path) -> None:
    assert_one_sentence(get(server, tmp_path, name="missing.tgz"), "missing.tgz", "404")
    assert_one_sentence(archives("get", "--output", tmp_path, "--from", tmp_path, "http://x/b.tgz"), "b.tgz")
    assert_one_sentence(archives("get", "--output", tmp_path, (tmp_path / "b.tgz").as_uri()), "b.tgz", "No such file")


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_checksums_of_every_kind_are_compared(server: Server, tmp_path: Path, kind: str) -> None:
    sums = tmp_path / "sums"
    sums.write_text(f"# a comment\n{hashlib.new(kind, DATA).hexdigest()} *somewhere/a.tgz\n")
    assert get(server, tmp_path / "out", "--checksums", sums).returncode == 0
    sums.write_text(f"{hashlib.new(kind, b'other').hexdigest()}  a.tgz\n")
    assert_one_sentence(get(server, tmp_path / "out", "--checksums", sums), "a.tgz", kind)
    sums.write_text("not a checksum\n")
    assert_one_sentence(get(server, tmp_path / "out", "--checksums", sums), "not a checksum")
    sums.write_text(f"{hashlib.new(kind, DATA).hexdigest()}  b.tgz\n")
    assert_one_sentence(get(server, tmp_path / "out", "--checksums", sums), "no checksum of a.tgz")


def test_nothing_but_the_named_files_comes_out_of_an_archive(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name in ("../outside", "folder/wanted", "folder/other"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"new"))
        link = tarfile.TarInfo("folder/link")
        link.type = tarfile.SYMTYPE
        link.linkname = str(outside)
        tar.addfile(link)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as container:
        for name in ("../outside", "folder/wanted", "folder/other"):
            container.writestr(name, "new")
        info = zipfile.ZipInfo("folder/link")
        info.external_attr = 0o120777 << 16
        container.writestr(info, str(outside))
    for archive in ("a.tgz", "a.zip"):
        out = tmp_path / f"of-{archive}"
        assert archives("extract", tmp_path / archive, out, "folder/wanted").returncode == 0
        assert [path for path in out.rglob("*") if path.is_file()] == [out / "folder" / "wanted"]
        assert_one_sentence(archives("extract", tmp_path / archive, out, "folder/link"), "has no file folder/link")
    assert outside.read_text() == "precious"
    (tmp_path / "b.tgz").write_bytes((tmp_path / "a.tgz").read_bytes()[:60])
    assert_one_sentence(archives("extract", tmp_path / "b.tgz", tmp_path / "out", "folder/wanted"), "b.tgz")
