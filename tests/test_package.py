"""What is promised of the package as a whole: its names, its imports, its documentation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import llm
import pytest

import llm_async_attachments
from llm_async_attachments import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = sorted(
    path.stem
    for path in (ROOT / "llm_async_attachments").glob("*.py")
    if path.stem not in ("__init__", "pytest_plugin")
)

# Further left may import what is further right, and never the other way round.
LAYERS = (
    ("plugin",),
    ("cli",),
    ("demo",),
    ("models",),
    ("converted",),
    ("instrumented", "twins"),
    ("prepare",),
    ("guard", "threads"),
    ("bridge", "gates"),
    ("attachment", "admission", "policy"),
    ("fetch", "memory"),
    ("offloop", "settings", "source"),
    ("errors",),
    ("loopback",),
)


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, at its top or in a function."""
    tree = ast.parse((ROOT / "llm_async_attachments" / f"{module}.py").read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found & set(MODULES)


def test_every_public_name_is_there_and_in_the_readme() -> None:
    """`__all__` is sorted, each name can be imported, and the README tells of it."""
    names = llm_async_attachments.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(llm_async_attachments, name).__doc__
        assert name in README or name == "AttachmentError"
    assert set(names) <= set(dir(llm_async_attachments))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="nothing"):
        llm_async_attachments.nothing  # noqa: B018


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    """In the table of the README and, in one line, on the setting."""
    assert re.search(rf"^\|.*`{name}`.*\|", README, re.M)
    assert Settings.model_fields[name].description


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("cli", "demo")])
def test_imports_run_one_way(module: str) -> None:
    """No module imports one of its own layer or of a higher one."""
    position = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert module in position, "a new module has a place in the layers"
    for other in imported(module):
        assert position[module] < position[other], f"{module} imports {other}"


def test_the_plugin_loads_nothing_heavy() -> None:
    """llm loads every plugin for every command; this one then costs next to nothing."""
    heavy = ("httpx", "anyio", "pydantic_settings", "greenlet", "pybase64")
    code = (
        "import sys, llm; before = set(sys.modules)\n"
        "import llm_async_attachments.plugin, llm_async_attachments.cli\n"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_llm_finds_the_plugin() -> None:
    """By its entry point, with its two hooks."""
    assert "async_attachments" in {entry.name for entry in entry_points(group="llm")}
    from llm_async_attachments import plugin

    assert llm.hookimpl.project_name == "llm"
    assert {"register_models", "register_commands"} <= set(vars(plugin))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_examples_of_the_readme_are_python(block: str) -> None:
    """Each can be compiled, top-level await included."""
    compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
