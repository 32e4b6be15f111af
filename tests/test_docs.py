"""What the documents and comments name exists: files, folders, links, and names to look for."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("adapters_store", "benchmarks", "clients", "deploy", "docs", "server", "tests")
TOP = [path for path in ROOT.iterdir() if path.is_file()]
BELOW = [path for room in ROOMS for path in (ROOT / room).rglob("*") if "__pycache__" not in path.parts]
FILES = [str(path.relative_to(ROOT)) for path in [*TOP, *BELOW] if path.is_file()]
FOLDERS = [str(path.relative_to(ROOT)) + "/" for path in BELOW if path.is_dir()]
FOLDERS += [f"{room}/" for room in ROOMS]
DOCUMENTS = [name for name in FILES if name.endswith(".md")]
SOURCES = [name for name in FILES if name.endswith(".py")]

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
PYTHON_FILE = re.compile(r"(?<![\w./*-])[\w*][\w/*-]*\.py\b")
FOLDER = re.compile(r"[a-z_]+(?:/[a-z_]+)*/")
NAME = re.compile(r"_?[A-Za-z]\w*")
OURS = {folder.split("/")[-2] for folder in FOLDERS}
# files of other projects, or of no project at all, that sentences speak of
FOREIGN = {"evil.py", "pip.py", "tuners/lora/layer.py", "variants.py"}


def exists(path: str, known: list[str]) -> bool:
    """Whether a file or folder of ours ends with this path, which may have a `*`."""
    return any(fnmatch(f"/{name}", f"*/{path}") for name in known)


def missing_files(text: str) -> set[str]:
    return {path for path in PYTHON_FILE.findall(text) if path not in FOREIGN and not exists(path, FILES)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    targets = {target for target in LINK.findall((ROOT / document).read_text()) if "://" not in target}
    assert {target for target in targets if not ((ROOT / document).parent / target).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_folder_that_a_document_names_exists(document: str) -> None:
    spans = CODE.findall((ROOT / document).read_text())
    folders = {span for span in spans if FOLDER.fullmatch(span) and span.split("/")[0] in OURS}
    assert {folder for folder in folders if not exists(folder, FOLDERS)} == set()
    assert set().union(*map(missing_files, spans)) == set()


@pytest.mark.parametrize("source", SOURCES)
def test_every_file_that_the_source_names_exists(source: str) -> None:
    assert missing_files((ROOT / source).read_text()) == set()


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/glossary.md"])
def test_every_name_that_the_architecture_names_is_in_the_source(document: str) -> None:
    spans = [span.strip("()") for span in CODE.findall((ROOT / document).read_text())]
    names = {part for span in spans if re.fullmatch(r"\w+(?:\.\w+)*", span) for part in span.split(".")}
    source = "\n".join((ROOT / path).read_text() for path in SOURCES if not path.startswith("tests/"))
    known = set(re.findall(r"\w+", source)) | {path.rpartition("/")[2].split(".")[0] for path in SOURCES}
    assert names - known - {"md", "py"} == set()


def rows_to_change() -> list[tuple[str, str]]:
    """(what is to be changed, where to go) of README's table."""
    _, header, table = (ROOT / "README.md").read_text().partition("| to change | open first |\n|---|---|\n")
    assert header, "README has no table of changes"
    rows = [line.strip("|").split("|") for line in table.partition("\n\n")[0].splitlines()]
    return [(what.strip(), where) for what, where in rows]


@pytest.mark.parametrize(("what", "where"), rows_to_change())
def test_what_the_table_of_changes_names_is_in_its_files(what: str, where: str) -> None:
    spans = CODE.findall(where)
    paths = [name for span in spans if "." in span for name in FILES if fnmatch(f"/{name}", f"*/{span}")]
    assert paths, f"{what}: no file is named"
    text = "\n".join((ROOT / path).read_text() for path in paths)
    names = {span for span in spans if NAME.fullmatch(span)}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()
