"""Settings: from the environment, overridden by `configure()`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import ByteSize, Field, ImportString, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

ENV_PREFIX = "LLM_ASYNC_ATTACHMENTS_"

Seconds = Annotated[float, Gt(0)]
Positive = Annotated[int, Ge(1)]
Bytes = Annotated[ByteSize, Ge(0)]


@lru_cache(maxsize=1)  # it reads a file
def _user_agent() -> str:
    from importlib.metadata import version

    return f"llm-async-attachments/{version('llm-async-attachments')} (+https://llm.datasette.io/)"


class Settings(BaseSettings):
    """Every setting, its default and its meaning.

    Each is read from the environment variable `LLM_ASYNC_ATTACHMENTS_<NAME>`; sizes are bytes or
    text such as `50MB`, times are seconds.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    max_bytes: Annotated[ByteSize, Ge(1)] = Field(
        ByteSize(50_000_000), description="largest body fetched from a URL"
    )
    max_concurrent_fetches: Positive = Field(16, description="fetches at once, per prompt")
    connect_timeout: Seconds = Field(10.0, description="seconds to get a connection")
    read_timeout: Seconds = Field(30.0, description="seconds without a byte")
    total_timeout: Seconds = Field(120.0, description="seconds for one attachment, with retries")
    max_redirects: Annotated[int, Ge(0)] = Field(5, description="redirects followed")
    retries: Annotated[int, Ge(0)] = Field(
        2, description="after a failed connection, 429, 502, 503 or 504"
    )
    guard: Literal["raise", "warn", "off"] = Field(
        "raise", description="what happens where only a blocking fetch would help"
    )
    guard_everywhere: bool = Field(
        False, description="guard all code on a running event loop; not for notebooks"
    )
    bridge: bool = Field(True, description="let a model's sync code wait without blocking")
    memory_budget: Annotated[ByteSize, Ge(1)] = Field(
        ByteSize(512_000_000), description="bytes held by all open preparations"
    )
    cache_bytes: Bytes = Field(
        ByteSize(64_000_000), description="bytes kept for the history of conversations; 0: none"
    )
    max_threads: Positive = Field(32, description="worker threads for converted models")
    async_concurrency: dict[str, Positive] = Field(
        default_factory=dict,
        description="execute() calls at once of a converted model, by model id (JSON)",
    )
    user_agent: str = Field(default_factory=_user_agent, description="sent with every fetch")
    client_factory: ImportString[Callable[[], Any]] | None = Field(
        None, description="makes the httpx.AsyncClient of a preparation (module:name)"
    )

    def origin(self, name: str) -> str:
        """Where a setting's value came from: `configure()`, an environment variable or default."""
        if name in _overrides:
            return "configure()"
        return ENV_PREFIX + name.upper() if name in self.model_fields_set else "default"


_overrides: dict[str, Any] = {}
_settings: Settings | None = None


def current() -> Settings:
    """The settings in force. Raises ValueError, naming the variable, where one is malformed."""
    global _settings
    if _settings is None:
        _settings = _read(_overrides)
    return _settings


def _read(overrides: dict[str, Any]) -> Settings:
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(e, overrides) for e in error.errors())) from None
    except SettingsError as error:  # text that is not the JSON it should be
        name = next((n for n in Settings.model_fields if f'"{n}"' in str(error)), "")
        raise ValueError(f"{ENV_PREFIX}{name.upper()} is malformed: {error.__cause__}") from None


def _explain(error: Any, overrides: dict[str, Any]) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        known = ", ".join(Settings.model_fields)
        return f"There is no setting {name!r}; there are {known}"
    where = f"configure({name}=...)" if name in overrides else ENV_PREFIX + name.upper()
    return f"{where} is {error['input']!r}: {error['msg']}"


class configure:  # a context manager that is used like a function
    """Override settings for the whole process: `configure(max_bytes="200MB")`.

    As a context manager, `with configure(...):`, it restores at the end what was before. Raises
    ValueError for a name or value that does not fit; nothing is changed then.
    """

    def __init__(self, **overrides: Any) -> None:
        self._before = dict(_overrides)
        _apply({**_overrides, **overrides})

    def __enter__(self) -> Settings:
        return current()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not read here: an environment that is malformed by now must not keep the overrides.
        global _overrides, _settings
        _overrides, _settings = self._before, None


def _apply(overrides: dict[str, Any]) -> None:
    global _overrides, _settings
    _settings = _read(overrides)
    _overrides = overrides


def reload() -> Settings:
    """Read the environment again; what `configure()` set stays."""
    _apply(_overrides)
    return current()
