"""The rules that tests/test_repo.py applies to the tree: what they find and what they leave alone."""

from __future__ import annotations

import pytest

from tests.kit import house_rules
from tests.kit.house_rules import Offence


def words(text: str) -> list[str]:
    return [each.text.partition(":")[0].strip("'") for each in house_rules.dialect("a.py", text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# the daemon takes up its pods", ["takes up"]),
        ("def told_at_end(): ...", ["told"]),
        ("class PodWish: ...", ["Wish"]),
        ("# it is no valid\n# port", ["is no "]),
        ("int patience_ms;", ["patience"]),
        ('"""A VM of its\n    own."""', ["of its own"]),
    ],
)
def test_dialect_is_found_in_prose_and_identifiers(text: str, found: list[str]) -> None:
    assert words(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "there is no space left",
        "it is no longer there",
        "file.tell()",
        "os.walk(root)",
        "looks up the name",
        "Look the method up",
        "looks_like_host",
        'user("nobody")',
        "# untold, swish, roomy, walkable",
        "# a marshalled value",
    ],
)
def test_dialect_leaves_terms_of_the_field(text: str) -> None:
    assert words(text) == []


def test_dialect_names_file_and_line() -> None:
    (found,) = house_rules.dialect("a.md", "one\ntwo shall three\n")
    assert found == Offence("a.md", 2, "'shall': must")
    assert str(found) == "a.md:2: 'shall': must"


def missing(text: str, **more: str) -> list[str]:
    sources = {"a.py": text} | {f"{name}.py": each for name, each in more.items()}
    return [each.text for each in house_rules.missing_docstrings(sources)]


def test_docstrings_missing_of_public_names_are_found() -> None:
    text = "def a(): ...\ndef _b(): ...\nclass C:\n    def d(self): ...\n    def _e(self): ...\n"
    expected = ["function a has no docstring", "class C has no docstring", "method C.d has no docstring"]
    assert missing(text) == expected


@pytest.mark.parametrize(
    "body",
    [
        "    @property\n    def a(self):\n        return 1\n",
        "    def __len__(self):\n        return 1\n",
        "    def RunPodSandbox(self): ...\n",
        "    @a.setter\n    def a(self, value): ...\n",
        "    @overload\n    def a(self): ...\n",
    ],
)
def test_docstrings_of_trivial_methods_may_be_missing(body: str) -> None:
    assert missing(f'class C:\n    """One."""\n{body}') == []


PROTOCOL = '''class P(Protocol):
    """A seam."""
    def a(self):
        """Do it."""
    def b(self):
        """Undo it."""
'''


def test_docstrings_of_a_whole_implementation_of_a_protocol_may_be_missing() -> None:
    whole = 'class C:\n    """One."""\n    def a(self): ...\n    def b(self): ...\n'
    assert missing(whole, p=PROTOCOL) == []
    part = 'class C:\n    """One."""\n    def a(self): ...\n'
    assert missing(part, p=PROTOCOL) == ["method C.a has no docstring"]


def test_docstrings_of_overridden_methods_may_be_missing() -> None:
    text = 'class B:\n    """One."""\n    def a(self):\n        """Do it."""\n'
    assert missing(text + 'class C(B):\n    """Two."""\n    def a(self): ...\n') == []


def test_test_names_with_one_word_or_capitals_are_found() -> None:
    text = "def test_exec(): ...\ndef test_A_b(): ...\ndef test_exec_fails(): ...\ndef helper(): ...\n"
    assert [each.line for each in house_rules.bad_test_names("a.py", text)] == [1, 2]


def test_files_above_the_limit_are_found() -> None:
    assert list(house_rules.long_files("a.py", "\n" * 600)) == []
    assert [each.line for each in house_rules.long_files("a.py", "\n" * 601)] == [601]
