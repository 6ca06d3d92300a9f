"""Rules of this repository that no linter knows: docstrings, test names, lengths of files, words.

Each rule takes the text of a file and yields its offences; tests/test_repo.py applies them to the tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

LONGEST_FILE = 600  # lines; 400 is where to check again whether the file should be two
TEST_NAME = re.compile(r"test_[a-z0-9]+(_[a-z0-9]+)+")


@dataclass(frozen=True, order=True)
class Offence:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


# ------------------------------------------------------------------------------------ lengths and names


def long_files(path: str, text: str) -> Iterator[Offence]:
    lines = text.count("\n")
    if lines > LONGEST_FILE:
        yield Offence(path, lines, f"{lines} lines, more than {LONGEST_FILE}")


def bad_test_names(path: str, text: str) -> Iterator[Offence]:
    """Yield tests whose name has an upper-case letter or fewer than two words after `test_`."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
            continue
        if not TEST_NAME.fullmatch(node.name):
            yield Offence(path, node.lineno, f"{node.name} does not match {TEST_NAME.pattern}")


# ------------------------------------------------------------------------------------------- docstrings

Function = ast.FunctionDef | ast.AsyncFunctionDef


def missing_docstrings(texts: Mapping[str, str]) -> Iterator[Offence]:
    """Yield public classes, functions and methods without a docstring; `texts` is text by path.

    Exempt are dunder methods, overloads, property accessors of one statement, setters, rpc methods (named in
    CamelCase, documented in the .proto), and methods that a Protocol or base class of `texts` documents.
    """
    trees = {path: ast.parse(text) for path, text in texts.items()}
    classes = {
        node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)
    }
    protocols = [node for node in classes.values() if "Protocol" in _base_names(node)]
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, Function) and _is_public(node) and not ast.get_docstring(node):
                yield Offence(path, node.lineno, f"function {node.name} has no docstring")
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    yield Offence(path, node.lineno, f"class {node.name} has no docstring")
                inherited = _documented_elsewhere(node, classes, protocols)
                for method in _methods(node).values():
                    if _is_public(method) and method.name not in inherited and not ast.get_docstring(method):
                        yield Offence(
                            path, method.lineno, f"method {node.name}.{method.name} has no docstring"
                        )


def _is_public(node: Function) -> bool:
    if node.name.startswith("_") or re.match(r"[A-Z]", node.name):
        return False
    decorators = {ast.unparse(each).split("(")[0] for each in node.decorator_list}
    if "overload" in decorators or any(each.endswith(".setter") for each in decorators):
        return False
    return not (decorators & {"property", "cached_property"} and len(node.body) == 1)


def _methods(node: ast.ClassDef) -> dict[str, Function]:
    return {each.name: each for each in node.body if isinstance(each, Function)}


def _base_names(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases}


def _documented_elsewhere(
    node: ast.ClassDef, classes: Mapping[str, ast.ClassDef], protocols: Iterable[ast.ClassDef]
) -> set[str]:
    """Methods of `node` that a base class, or a Protocol that it implements wholly, documents."""
    own = _methods(node)
    sources = [classes[name] for name in _base_names(node) if name in classes]
    for protocol in protocols:
        prescribed = _methods(protocol).keys()
        if protocol is not node and prescribed and prescribed <= own.keys():
            sources.append(protocol)
    documented = {
        name for each in sources for name, method in _methods(each).items() if ast.get_docstring(method)
    }
    for each in sources:
        documented |= _documented_elsewhere(each, classes, ()) if each is not node else set()
    return documented


# ------------------------------------------------------------------------------------------------ words

# Words and turns that the field does not use, with what it says. In identifiers too.
WORDS = {
    "wish|wishes|wished": "request, options, spec",
    "tak(?:e|es|en|ing) up|took up|taken_up|take_up": "recover, reattach",
    "let go|lets go|let_go": "release, detach",
    "tell|tells|told|telling": "report, send, say what is written or read",
    "looks?|looked|looking": "read, poll, sample, check",
    "gives? up|gave up|given up|giving up": "stop after N, fail, time out",
    "sees? to it|saw to it": "name the mechanism",
    "whoever|nobody|somebody": "name who",
    "anew|afresh": "again",
    "shall": "must",
    "of (?:its|their|his|our) own": "its own, separate",
    "patience": "timeout",
    "farewell": "final message",
    "workshop": "standalone mode",
    "errands?": "warm-up command",
    "rehears(?:al|als|e|es|ed)": "dry run",
    "inlets?|outlets?|ears?": "stdin writer, output queue, stdio reader",
    "flavou?rs?": "kind, variant",
    "verdicts?": "result, choice",
    "rooms?": "space, capacity",
    "senseless": "invalid",
    "walk|walks|walked|walking": "steps, traverse, iterate",
    "fit for": "suitable for, usable by",
    "ahead of time": "in advance",
    "ought": "should",
    "heed|heeds|heedless": "follow, ignore",
    "surroundings": "environment",
}
# Where a word is the field's own: `nobody` the account, tell() of a file, "look up", walk() of a tree.
ALLOWED = re.compile(
    r"""["'`/:]nobody["'`:/]|nobody:|user nobody|\.tell\(|\.walk\(|def walk\(|"""
    r"""(?i:look(?:s|ed|ing)?(?:[ _-]up\b|(?: \w+){1,2} up\b|[ _]like))"""
)


def dialect(path: str, text: str) -> Iterator[Offence]:
    """Yield the words of WORDS, and "is no X" where "is not a X" is meant."""
    flat, lines = _flatten(text)
    found: set[Offence] = set()
    for pattern, instead in _PATTERNS:
        for match in pattern.finditer(flat):
            allowed = ALLOWED.search(flat, max(0, match.start() - 6), match.end() + 30)
            if not (allowed and allowed.start() <= match.start() < allowed.end()):
                found.add(Offence(path, lines[match.start()], f"{match.group()!r}: {instead}"))
    yield from sorted(found)


def _pattern(words: str) -> re.Pattern[str]:
    words = words.replace(" ", r"[ _]")
    capital = "|".join(each[0].upper() + each[1:] for each in words.split("|") if each[0].isalpha())
    return re.compile(rf"(?:(?<![A-Za-z])(?:{words})|(?<![A-Z])(?:{capital}))(?![a-z])")


_PATTERNS = [(_pattern(words), instead) for words, instead in WORDS.items()]
_PATTERNS.append(
    (re.compile(r"(?<![Tt]here )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b)"), "is not a")
)


def _flatten(text: str) -> tuple[str, list[int]]:
    """The text with line ends, indentation and comment marks as one space, and each character's line."""
    flat: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = re.sub(r"^\s*(?:#|//|\*(?!/)|\*\*)?\s*", "", line) + " "
        flat.append(stripped)
        lines += [number] * len(stripped)
    return "".join(flat), lines
