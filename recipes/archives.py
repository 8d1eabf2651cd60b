#!/usr/bin/env python3
"""Get public archives: download or local copies, checksums, and the wanted files out of them.

archives.py get --output DIR [--from URL_OR_DIR] [--checksums FILE] URL...    DIR/NAME for each, and DIR/SHA256SUMS
archives.py extract ARCHIVE DIR MEMBER...                                     DIR/MEMBER for each

A download goes to NAME.part, which an interrupted one leaves and the next one continues, and gets its name when it is
complete. SHA256SUMS records what was got: a later run, or another machine with that file, sees whether it has the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

BLOCK = 1 << 20
ATTEMPTS = 5
# Several times what the largest archive and the largest file in one of them have.
MAX_ARCHIVE = 8 << 30
MAX_MEMBER = 8 << 30
# Kinds of checksum by the number of their hexadecimal digits.
KINDS = {32: "md5", 40: "sha1", 64: "sha256"}
RECORD = "SHA256SUMS"


def fail(message: str) -> NoReturn:
    """End with one sentence."""
    sys.exit(f"archives.py: {message}")


def digest(path: Path, kind: str) -> str:
    """Checksum of a file, in hexadecimal digits."""
    result = hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            result.update(block)
    return result.hexdigest()


def read_checksums(path: Path) -> dict[str, list[str]]:
    """Checksums by file name from a file as sha256sum (or sha1sum or md5sum) writes it: digits, white space, name."""
    sums: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        digits, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*")
        if len(digits) not in KINDS or not name or set(digits.lower()) - set("0123456789abcdef"):
            fail(f"{path} has a line that is no checksum and file name: '{line}'.")
        sums.setdefault(PurePosixPath(name).name, []).append(digits.lower())
    return sums


def verify(path: Path, expected: Iterable[str], where: object) -> None:
    """End with a sentence if the file has not the checksums."""
    for wanted in expected:
        if digest(path, KINDS[len(wanted)]) != wanted:
            fail(f"{path} has not the {KINDS[len(wanted)]} checksum {wanted} of {where}: remove it to get it again.")


def download(url: str, path: Path) -> None:
    """Download to path, going on with path.part if there is one."""
    part = path.with_name(path.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            receive(url, part)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and part.exists():
                # Nothing is there beyond the .part: it is all of it, or of something else.
                if error.headers.get("Content-Range", "").endswith(f"/{part.stat().st_size}"):
                    break
                part.unlink()
            elif error.code < 500 or attempt == ATTEMPTS:
                fail(f"{url} cannot be downloaded: {error}.")
        except (OSError, ValueError) as error:
            local = isinstance(error, ValueError) or url.startswith("file:")
            if local or attempt == ATTEMPTS:
                reason = getattr(error, "reason", error)
                fail(f"{url} cannot be downloaded: {reason} (what has come is kept, the same command goes on).")
        time.sleep(attempt)
    else:
        fail(f"{url} cannot be downloaded.")
    os.replace(part, path)


def receive(url: str, part: Path) -> None:
    """One attempt of a download. Raises OSError if it breaks off."""
    done = part.stat().st_size if part.exists() else 0
    # Some places refuse urllib's own name.
    headers = {"User-Agent": "fwp-fairseq"} | ({"Range": f"bytes={done}-"} if done else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        # A server may send all of it instead of the rest.
        resumed = answer.status == 206
        expected = answer.headers.get("Content-Length")
        with part.open("ab" if resumed else "wb") as file:
            start = done if resumed else 0
            received = copy_bounded(answer, file, MAX_ARCHIVE - start, url)
        if expected is not None and received != int(expected):
            raise OSError(f"{received} bytes of {expected} have come")


def copy_bounded(source: IO[bytes], target: IO[bytes], limit: int, name: object) -> int:
    """Copy at most limit bytes, end with a sentence if there are more; the number of bytes."""
    copied = 0
    while block := source.read(BLOCK):
        copied += len(block)
        if copied > limit:
            fail(f"{name} is larger than anything expected here.")
        target.write(block)
    return copied


def locate(url: str, output: Path, origin: str) -> tuple[Path, str | None]:
    """Where the archive of this public address is or is going to be, and where to download it, if it is to be."""
    name = PurePosixPath(url).name
    if origin and "://" not in origin:
        path = Path(origin) / name
        if not path.is_file():
            fail(f"there is no {name} in {origin}.")
        return path, None
    return output / name, f"{origin.rstrip('/')}/{name}" if origin else url


def get(urls: Sequence[str], output: Path, origin: str, checksums: Path | None) -> None:
    """Get each archive, check it, and record its checksum."""
    output.mkdir(parents=True, exist_ok=True)
    record = output / RECORD
    recorded = read_checksums(record) if record.exists() else {}
    expected = read_checksums(checksums) if checksums else {}
    found: dict[str, str] = {}
    for url in urls:
        path, source = locate(url, output, origin)
        if source is not None and not path.exists():
            print(f"downloading {source}", flush=True)
            download(source, path)
        if checksums and path.name not in expected:
            fail(f"{checksums} has no checksum of {path.name}.")
        verify(path, expected.get(path.name, ()), checksums)
        found[path.name] = digest(path, "sha256")
        if recorded.get(path.name, [found[path.name]])[0] != found[path.name]:
            fail(f"{path} is not what {record} says was got before: another file, or another place to get it from.")
        print(f"{found[path.name]}  {path.name}", flush=True)
        # What is extracted is looked up in the output folder.
        link = output / path.name
        if source is None and (link.is_symlink() or not link.exists()):
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
        kept = {name: digits[0] for name, digits in recorded.items()} | found
        temporary = record.with_name(record.name + ".new")
        temporary.write_text("".join(f"{digits}  {name}\n" for name, digits in sorted(kept.items())), encoding="utf-8")
        os.replace(temporary, record)


def extract(archive: Path, output: Path, members: Sequence[str]) -> None:
    """Write the named members, and nothing else, under output, each whole or not at all.

    Paths are those that were asked for, and only the bytes of regular files are taken: names and links in the archive
    that lead elsewhere have no effect.
    """
    wanted = set(members)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as container:
            for info in container.infolist():
                # A symbolic link in a zip has its kind in the upper half of the attributes.
                regular = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
                if info.filename in wanted and regular:
                    with container.open(info) as source:
                        save(source, output / info.filename)
                    wanted.discard(info.filename)
    else:
        with tarfile.open(archive, "r|*") as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                file = tar.extractfile(entry) if name in wanted and entry.isfile() else None
                if file is not None:
                    save(file, output / name)
                    wanted.discard(name)
                if not wanted:
                    break
    if wanted:
        fail(f"{archive} has no file {', '.join(sorted(wanted))}.")


def save(source: IO[bytes], path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        copy_bounded(source, file, MAX_MEMBER, path.name)
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Get public archives and the wanted files out of them.")
    commands = parser.add_subparsers(dest="command", required=True)
    getter = commands.add_parser("get", help="download, check and record archives")
    getter.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the archives")
    getter.add_argument("--from", dest="origin", default="", help="a base address or a folder of them")
    getter.add_argument("--checksums", type=Path, metavar="FILE", help="checksums that the archives must have")
    getter.add_argument("urls", nargs="+", metavar="URL", help="public address, which ends with the file's name")
    extractor = commands.add_parser("extract", help="write some members of an archive")
    extractor.add_argument("archive", type=Path)
    extractor.add_argument("output", type=Path, metavar="DIR")
    extractor.add_argument("members", nargs="+", metavar="MEMBER")
    options = parser.parse_args(arguments)
    if options.command == "get":
        get(options.urls, options.output, options.origin, options.checksums)
    else:
        try:
            extract(options.archive, options.output, options.members)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            fail(f"{options.archive} cannot be read: {error}.")


if __name__ == "__main__":
    main()
