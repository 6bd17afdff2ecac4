"""pytest fixtures for plugin authors: real servers on loopback, and the guard.

They are there once the package is installed; none is used unless a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .loopback import MediaHost, ModelAPI


@pytest.fixture
def media_host() -> Iterator[MediaHost]:
    """A real HTTP server on loopback that serves small media files and records its requests.

    `media_host.url("image.png")`, `media_host.count()`; faults: see `loopback.MediaHost.add()`.
    """
    from .loopback import MediaHost

    with MediaHost() as host:
        yield host


@pytest.fixture
def model_api() -> Iterator[ModelAPI]:
    """A real HTTP server on loopback that answers like OpenAI's API and records its requests."""
    from .loopback import ModelAPI

    with ModelAPI() as api:
        yield api


@pytest.fixture
def blocking_fetches_raise() -> Iterator[None]:
    """Within the test, an attachment that would block the event loop raises BlockingFetchError,
    whatever the setting `guard` says, for all code on any running loop."""
    from .guard import install
    from .settings import configure

    install()
    with configure(guard="raise", guard_everywhere=True):
        yield
