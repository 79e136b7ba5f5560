"""The budgets: a package stays thin only where a test holds it to that.

They count words of code (names, numbers, texts, operators), so that neither wide lines
nor missing docstrings pay.
"""

import re
import tokenize

import pytest

from mnist_helpers.data import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "mnist_helpers"
NAMES = ("data", "augment", "model", "evaluation", "training", "plots")
CORE = [PACKAGE / f"{name}.py" for name in NAMES]
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((PROJECT_ROOT / "tests").glob("*.py"))
WORDS = ("NAME", "NUMBER", "STRING", "OP", "FSTRING_END")


def count_words(path):
    """Words of code, and the lines that hold some; docstrings and brackets are free."""
    lines = []
    depth = 0  # since Python 3.12 an f-string comes in parts: it is one word
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            kind = tokenize.tok_name[token.type]
            depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
            free = token.string in "()[]{},:." or token.string.startswith('"""')
            if kind in WORDS and not free and not depth:
                lines.append(token.start[0])
    return len(lines), len(set(lines))


@pytest.mark.parametrize(
    ("paths", "most"), [(CORE, 3008), (MODULES, 6719), (TESTS, 18_000)]
)
def test_words(paths, most):
    assert most / 2 < sum(count_words(path)[0] for path in paths) <= most


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_lines_are_plain(path):
    words, lines = count_words(path)
    assert words <= 7 * lines


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_imports_only_what_stands_above_it(path):
    text = path.read_text("utf-8")
    imported = re.findall(r"^ *(?:from|import) mnist_helpers\.?(\w*)", text, re.M)
    assert set(imported) <= set(NAMES[: CORE.index(path)])


def test_readme_is_short():
    assert len((PROJECT_ROOT / "README.md").read_text("utf-8").split()) <= 850
