"""The llm hooks."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import click
import llm


@llm.hookimpl(wrapper=True, tryfirst=True)  # type: ignore[untyped-decorator, unused-ignore]
def register_models(register: Any, model_aliases: list[Any]) -> Generator[None, Any, Any]:
    """Convert sync-only models and instrument async ones, after every plugin has registered.

    A wrapper runs after all that is none, and the first of the wrappers ends last.
    """
    result = yield
    from .models import take_hold

    take_hold(model_aliases)
    return result


@llm.hookimpl  # type: ignore[untyped-decorator, unused-ignore]
def register_commands(cli: click.Group) -> None:
    """Add `llm async-attachments`."""
    from .cli import group

    cli.add_command(group)
