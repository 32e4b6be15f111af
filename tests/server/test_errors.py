"""One tree of errors: every code stands for one class, and the drawing at its top is true."""

import pytest

import server.errors
from server.errors import NotFound, PolypeftError, error_from_code, shown


def tree(root: type[PolypeftError] = PolypeftError) -> list[type[PolypeftError]]:
    return [root, *(c for sub in root.__subclasses__() for c in tree(sub))]


def test_codes_are_unique() -> None:
    codes = [c.code for c in tree()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", tree(), ids=lambda c: c.__name__)
def test_an_error_survives_a_process_boundary(kind: type[PolypeftError]) -> None:
    sent = kind("One sentence.", param="field")
    got = error_from_code(sent.code, sent.message, sent.param)
    assert (type(got), got.message, got.param, got.code) == (kind, "One sentence.", "field", sent.code)


def test_an_unknown_code_is_our_fault() -> None:
    got = error_from_code("from_the_future", "Sentence.")
    assert (type(got), got.status, got.code) == (PolypeftError, 500, "from_the_future")


def test_a_code_of_ones_own_keeps_the_status() -> None:
    assert NotFound("No.", code="file_not_found").status == 404


def test_the_drawing_shows_every_class_with_its_status() -> None:
    drawing = {
        words[0]: words[1]
        for line in (server.errors.__doc__ or "").splitlines()
        if len(words := line.strip("│├└─ ").split()) > 1
    }
    for kind in tree():
        assert kind.__name__ in drawing
        if drawing[kind.__name__].isdigit():
            assert int(drawing[kind.__name__]) == kind.status


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "'plain'"),
        ("a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
        ("é" * 3, r"'\xe9\xe9\xe9'"),
        (12, "12"),
        ("x" * 10_000, "'" + "x" * 63 + "..."),
    ],
)
def test_a_callers_value_is_shown_short_and_tame(value: object, text: str) -> None:
    assert shown(value) == text
