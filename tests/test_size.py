"""The budgets: a helper package stays thin only where a test holds it to that."""

import ast
import json
import re

import pytest

from mnist_helpers.data import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "mnist_helpers"
CORE = [PACKAGE / f"{name}.py" for name in ("data", "augment", "model", "evaluation", "training", "plots")]
MODULES = sorted(PACKAGE.rglob("*.py"))


def count_lines(paths) -> int:
    """Lines of code and docstrings; blank ones and comments do not count."""
    lines = [line.strip() for path in paths for line in path.read_text("utf-8").splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_lines():
    assert 400 < count_lines(CORE) <= 600
    assert count_lines(CORE) < count_lines(MODULES) <= 1255  # two thirds of the rest read pictures


def test_modules():
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 9
    assert 0 < sum("learning_rate" in path.read_text("utf-8") for path in MODULES) <= 2


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_imports_only_what_stands_above_it(path):
    """In the order of `CORE`: nothing in it hangs on an extra, and it can be read from top to bottom."""
    tree = ast.walk(ast.parse(path.read_text("utf-8")))
    imported = [node.module for node in tree if isinstance(node, ast.ImportFrom)]
    ours = {name.removeprefix("mnist_helpers.") for name in imported if name.startswith("mnist_helpers")}
    assert ours <= {above.stem for above in CORE[: CORE.index(path)]}


def test_notebook_and_readme():
    notebook = json.loads((PROJECT_ROOT / "notebook.ipynb").read_text("utf-8"))
    assert len(notebook["cells"]) <= 100
    readme = (PROJECT_ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 90
    assert len(re.findall(r"\S*\w\S*", readme)) <= 700
