"""recipes/ui_strings/collect.py: what goes from message catalogues in wheels into the corpus, and into which part."""

import hashlib
import importlib.util
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "ui_strings"

# A test environment without the recipe's own requirement still runs all other tests.
pytest.importorskip("babel")
from babel.messages.catalog import Catalog  # noqa: E402
from babel.messages.mofile import write_mo  # noqa: E402
from babel.messages.pofile import write_po  # noqa: E402

Message = tuple[str, str]


def load_collect() -> ModuleType:
    """Import collect.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("collect", RECIPE / "collect.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


collect = load_collect()


def catalogue(messages: Iterable[Message], fuzzy: Iterable[Message] = (), extension: str = "po") -> bytes:
    """A German catalogue as the bytes of a .po or .mo file."""
    result = Catalog(locale="de")
    for source, target in messages:
        result.add(source, target)
    for source, target in fuzzy:
        result.add(source, target, flags=["fuzzy"])
    stream = io.BytesIO()
    (write_po if extension == "po" else write_mo)(stream, result)
    return stream.getvalue()


def make_wheel(folder: Path, name: str, members: Mapping[str, bytes]) -> Path:
    """A wheel of version 1.0 with these members."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return path


VERBS = """Save speichern, Open öffnen, Delete löschen, Copy kopieren, Move verschieben, Show zeigen, Hide verbergen,
Print drucken, Find finden, Rename umbenennen, Send senden, Edit bearbeiten"""
THINGS = """file Datei, folder Ordner, page Seite, image Bild, message Nachricht, account Konto, project Projekt,
window Fenster, table Tabelle, user Benutzer, event Termin, link Link"""


def phrases(verbs: int, things: int) -> list[Message]:
    """verbs x things different strings, up to 12 x 12, that a small model can learn something of."""
    verb = [word.split() for word in VERBS.split(",")[:verbs]]
    noun = [word.split() for word in THINGS.split(",")[:things]]
    return [
        (f"{verb_en} the {noun_en}", f"{noun_de} {verb_de}") for verb_en, verb_de in verb for noun_en, noun_de in noun
    ]


DE = "app/locale/de/LC_MESSAGES/django"


def build(tmp_path: Path, members: Mapping[str, bytes], *options: str) -> dict[str, list[Message]]:
    """The parts of the corpus that collect.py makes of one wheel."""
    make_wheel(tmp_path / "wheels", "app", members)
    sizes = options or ("--valid-size", "1", "--test-size", "1")
    assert run(tmp_path, *sizes) == 0
    return read(tmp_path / "corpus")


def run(tmp_path: Path, *options: str) -> int:
    return int(collect.main(["--wheels", str(tmp_path / "wheels"), "--output", str(tmp_path / "corpus"), *options]))


def read(corpus: Path) -> dict[str, list[Message]]:
    parts = {}
    for part in ("train", "valid", "test"):
        english, german = ((corpus / f"{part}.{language}").read_text("utf-8").splitlines() for language in ("en", "de"))
        parts[part] = list(zip(english, german, strict=True))
    return parts


def pairs(parts: Mapping[str, list[Message]]) -> dict[str, str]:
    return dict(pair for part in parts.values() for pair in part)


def test_keeps_translations_and_drops_fuzzy_empty_equal_and_wordless_pairs(tmp_path: Path) -> None:
    messages = [
        ("Open file", "Datei öffnen"), ("Close file", "Datei schließen"), ("Quit now", "Jetzt beenden"),
        ("Untranslated", ""), ("Python", "Python"), ("%(count)s / 3", "%(count)s von 3"), ("A", "Ein"),
        ("<p><b>Hi</b> <i>you</i></p>", "<p><b>Hallo</b> <i>du</i></p>"), ("word " * 101, "Wort " * 101),
        ("Run", "Lauf " * 30),
    ]  # fmt: skip
    found = pairs(build(tmp_path, {DE + ".po": catalogue(messages, fuzzy=[("Print page", "Seite holen")])}))
    assert found == {"Open file": "Datei öffnen", "Close file": "Datei schließen", "Quit now": "Jetzt beenden"}


def test_white_space_and_invisible_characters_become_single_spaces(tmp_path: Path) -> None:
    messages = [*phrases(2, 2), ("Two\n  lines\tand\u00a0more\u2028here ", " Zwei\r\nZeilen  und\u0085mehr ")]
    assert (
        pairs(build(tmp_path, {DE + ".po": catalogue(messages)}))["Two lines and more here"] == "Zwei Zeilen und mehr"
    )


@pytest.mark.parametrize("extension", ["po", "mo"])
def test_plural_forms_are_paired_singular_with_singular_and_plural_with_plural(tmp_path: Path, extension: str) -> None:
    german = Catalog(locale="de")
    german.add(("%(n)s file", "%(n)s files"), ("%(n)s Datei", "%(n)s Dateien"))
    for source, target in phrases(2, 2):
        german.add(source, target)
    stream = io.BytesIO()
    (write_po if extension == "po" else write_mo)(stream, german)
    found = pairs(build(tmp_path, {f"{DE}.{extension}": stream.getvalue()}))
    assert found["%(n)s file"] == "%(n)s Datei"
    assert found["%(n)s files"] == "%(n)s Dateien"


def test_a_source_keeps_its_most_frequent_target_and_the_first_of_equals(tmp_path: Path) -> None:
    first = catalogue([*phrases(2, 2), ("Home page", "Startseite"), ("Log in", "Einloggen")])
    second = catalogue([("Home page", "Hauptseite"), ("Log in", "Anmelden")])
    third = catalogue([("Log in", "Anmelden")])
    for name, data in (("a", first), ("b", second), ("c", third)):
        make_wheel(tmp_path / "wheels", name, {DE + ".po": data})
    assert run(tmp_path, "--valid-size", "1", "--test-size", "1") == 0
    found = pairs(read(tmp_path / "corpus"))
    assert found["Home page"] == "Startseite"
    assert found["Log in"] == "Anmelden"


def test_po_is_preferred_to_mo_and_other_languages_are_left_alone(tmp_path: Path) -> None:
    members = {
        DE + ".mo": catalogue([("Only compiled", "Nur übersetzt")], extension="mo"),
        DE + ".po": catalogue(phrases(2, 2)),
        "app/translations/de_DE/LC_MESSAGES/messages.mo": catalogue([("Sign out", "Abmelden")], extension="mo"),
        "app/locale/fr/LC_MESSAGES/django.po": catalogue([("Good day", "Bonjour monsieur")]),
        "app/locale/de_CH/LC_MESSAGES/django.po": catalogue([("Street", "Strasse")]),
    }
    assert set(pairs(build(tmp_path, members))) == {source for source, _ in phrases(2, 2)} | {"Sign out"}


def test_another_target_language_takes_its_catalogues_and_leaves_none_of_the_first(tmp_path: Path) -> None:
    french = [("Good day", "Bonjour monsieur"), ("Good night", "Bonne nuit"), ("Thank you", "Merci beaucoup")]
    build(tmp_path, {DE + ".po": catalogue(phrases(2, 2)), "app/fr_FR/LC_MESSAGES/app.po": catalogue(french)})
    assert run(tmp_path, "--valid-size", "1", "--test-size", "1", "--target-language", "fr") == 0
    targets = [line for file in (tmp_path / "corpus").glob("*.fr") for line in file.read_text("utf-8").splitlines()]
    assert sorted(targets) == sorted(target for _, target in french)
    assert not list((tmp_path / "corpus").glob("*.de"))


def test_members_with_names_that_leave_the_folder_are_neither_read_nor_written(tmp_path: Path) -> None:
    evil = catalogue([("Evil string", "Böse Zeichenkette")])
    members = {
        DE + ".po": catalogue(phrases(2, 2)),
        "../outside/locale/de/LC_MESSAGES/x.po": evil,
        "app/../../locale/de/LC_MESSAGES/y.po": evil,
        "/tmp/locale/de/LC_MESSAGES/z.po": evil,
    }
    assert "Evil string" not in pairs(build(tmp_path, members))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "wheels"]


def test_no_source_is_in_two_parts_whatever_its_case_and_punctuation(tmp_path: Path) -> None:
    messages = []
    for source, target in phrases(12, 12):
        for english, german in ((source, target), (source.upper(), target.upper()), (f"&{source}…", f"&{target}…")):
            messages.append((english, german))
    parts = build(tmp_path, {DE + ".po": catalogue(messages)}, "--valid-size", "20", "--test-size", "30")
    assert [len(parts[part]) for part in ("valid", "test")] == [20, 30]
    assert len(parts["train"]) == 3 * (144 - 50)
    keys = [{collect.key(source) for source, _ in part} for part in parts.values()]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_the_part_of_a_source_depends_on_nothing_but_the_source(tmp_path: Path) -> None:
    sizes = ("--valid-size", "20", "--test-size", "30")
    messages = phrases(12, 12)
    one = build(tmp_path / "one", {DE + ".po": catalogue(messages)}, *sizes)
    other = build(tmp_path / "other", {DE + ".po": catalogue((s, t + "!") for s, t in reversed(messages))}, *sizes)
    for part in one:
        assert {source for source, _ in one[part]} == {source for source, _ in other[part]}


def test_the_same_wheels_give_the_same_files_and_a_manifest_of_them(tmp_path: Path) -> None:
    build(tmp_path, {DE + ".po": catalogue(phrases(5, 5))})
    corpus = tmp_path / "corpus"
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    assert run(tmp_path, "--valid-size", "1", "--test-size", "1") == 0
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before
    manifest = json.loads(before["corpus.json"])
    assert manifest["pairs"] == {"train": 23, "valid": 1, "test": 1}
    assert manifest["files"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in before.items() if name != "corpus.json"
    }
    assert [(row["name"], row["version"]) for row in manifest["wheels"]] == [("app", "1.0")]


def test_an_interrupted_run_leaves_no_manifest_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, {DE + ".po": catalogue(phrases(5, 5))})
    corpus = tmp_path / "corpus"
    before = {path.name: path.read_bytes() for path in corpus.iterdir() if path.name != "corpus.json"}
    replace = collect.os.replace

    def interrupt(source: str, target: Path) -> None:
        if Path(target).name == "valid.de":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(collect.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--valid-size", "2", "--test-size", "1")
    after = {path.name: path.read_bytes() for path in corpus.iterdir()}
    assert set(after) == set(before)
    assert after["valid.de"] == before["valid.de"]


def corrupt_wheel(folder: Path) -> None:
    folder.mkdir()
    (folder / "bad-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")


def truncated_catalogue(folder: Path) -> None:
    path = make_wheel(folder, "bad", {DE + ".po": catalogue(phrases(5, 5)), "x": b"y" * 100})
    data = bytearray(path.read_bytes())
    data[100:200] = bytes(100)
    path.write_bytes(bytes(data))


def invalid_po(folder: Path) -> None:
    make_wheel(folder, "bad", {DE + ".po": b'msgid "Open"\nmsgstr "\xff\xfe"\n'})


def invalid_mo(folder: Path) -> None:
    make_wheel(folder, "bad", {DE + ".mo": b"not a catalogue"})


def no_german(folder: Path) -> None:
    make_wheel(folder, "bad", {"app/locale/fr/LC_MESSAGES/x.po": catalogue(phrases(5, 5))})


def too_few(folder: Path) -> None:
    make_wheel(folder, "bad", {DE + ".po": catalogue(phrases(2, 1))})


def no_wheel(folder: Path) -> None:
    folder.mkdir()


def huge_catalogue(folder: Path) -> None:
    path = folder / "bad-1.0-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(DE + ".po", bytes(collect.MAX_CATALOGUE_BYTES + 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (corrupt_wheel, ["bad-1.0-py3-none-any.whl", "not a readable wheel"]),
        (truncated_catalogue, ["bad-1.0-py3-none-any.whl", "cannot be read"]),
        (invalid_po, ["bad-1.0-py3-none-any.whl", "django.po", "cannot be read"]),
        (invalid_mo, ["bad-1.0-py3-none-any.whl", "django.mo", "cannot be read"]),
        (huge_catalogue, ["bad-1.0-py3-none-any.whl", "django.po", "larger than"]),
        (no_german, ["No message catalogue of 'de'"]),
        (too_few, ["too few", "--valid-size 1", "--test-size 1"]),
        (no_wheel, ["--wheels", "holds no .whl"]),
    ],
)
def test_bad_input_gives_one_sentence_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], words: list[str]
) -> None:
    make(tmp_path / "wheels")
    assert run(tmp_path, "--valid-size", "1", "--test-size", "1") == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "corpus" / "corpus.json").exists()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_sizes_that_are_no_positive_numbers_are_rejected(tmp_path: Path, value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--test-size", value)
    assert stop.value.code == 2


def packages_file(tmp_path: Path, requirement: str, wheel: Path) -> list[str]:
    table = tmp_path / "packages.tsv"
    table.write_text(f"# a comment\n{requirement}\t{hashlib.sha256(wheel.read_bytes()).hexdigest()}\tMIT\n")
    return ["--packages", str(table), "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "corpus")]


def test_a_wheel_in_the_cache_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "cache", "My_App", {DE + ".po": catalogue(phrases(5, 5))})
    monkeypatch.setattr(collect.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    arguments = packages_file(tmp_path, "my-app==1.0", wheel)
    assert collect.main([*arguments, "--valid-size", "1", "--test-size", "1"]) == 0


def test_pip_of_the_same_python_brings_a_missing_wheel_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "index", "my_app", {DE + ".po": catalogue(phrases(5, 5))})
    commands = []

    class Done:
        returncode = 0

    def pip(command: list[str], check: bool) -> Done:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return Done()

    monkeypatch.setattr(collect.subprocess, "run", pip)
    arguments = packages_file(tmp_path, "my-app==1.0", wheel)
    assert collect.main([*arguments, "--valid-size", "1", "--test-size", "1"]) == 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [wheel.name]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "my-app==1.0" and "--no-deps" in commands[0]
    # pip's own configuration says where packages come from.
    assert not any("index-url" in word or "://" in word for word in commands[0])


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = make_wheel(tmp_path / "cache", "my_app", {DE + ".po": catalogue(phrases(5, 5))})
    arguments = packages_file(tmp_path, "my-app==1.0", wheel)
    make_wheel(tmp_path / "cache", "my_app", {DE + ".po": catalogue(phrases(6, 5))})
    assert collect.main(arguments) == 1
    assert wheel.name in capsys.readouterr().err


def test_the_table_of_packages_is_pinned_checksummed_and_permissive() -> None:
    packages = collect.read_packages(RECIPE / "packages.tsv")
    assert len({package.requirement.split("==")[0] for package in packages}) == len(packages)
    for package in packages:
        assert len(package.sha256) == 64
        assert package.licence in {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0"}
    # The README's table says the same.
    rows = re.findall(r"^\| ([\w, -]+) \| ([\w.-]+) \|$", (RECIPE / "README.md").read_text("utf-8"), re.MULTILINE)
    told = {(name, licence) for names, licence in rows for name in names.split(", ")}
    assert {(package.requirement.split("==")[0], package.licence) for package in packages} <= told
