"""What every test starts from: default settings, an empty LLM_USER_PATH, nothing learned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_async_attachments import memory, policy, settings


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def pristine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(settings.ENV_PREFIX + name.upper(), raising=False)
    with settings.configure():
        settings.reload()
        yield
    memory.cache.clear()
    policy.seen.clear()
    assert memory.budget.used == 0, "a preparation was left open"
    assert memory.budget.waiting == memory.sizing.used == 0


@pytest.fixture(autouse=True, scope="module")
def no_litter() -> Iterator[None]:
    """Clients that the OpenAI SDK never closes would be closed in the event loop of some test."""
    yield
    gc.collect()
