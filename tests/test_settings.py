"""Settings: from the environment, overridden by configure(), restored, and told from where."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_async_attachments import Settings, configure
from llm_async_attachments.settings import ENV_PREFIX, current, reload


def a_factory() -> httpx.AsyncClient:
    raise NotImplementedError


# name, default, (text in the environment, value), malformed text
TABLE = [
    ("max_bytes", 50_000_000, ("200MB", 200_000_000), "large"),
    ("max_bytes", 50_000_000, ("1MiB", 1_048_576), "0"),
    ("max_concurrent_fetches", 16, ("3", 3), "0"),
    ("connect_timeout", 10, ("0.5", 0.5), "0"),
    ("read_timeout", 30, ("inf", float("inf")), "nan"),
    ("total_timeout", 120, ("7", 7), "-1"),
    ("max_redirects", 5, ("0", 0), "-1"),
    ("retries", 2, ("0", 0), "1.5"),
    ("guard", "raise", ("warn", "warn"), "on"),
    ("guard_everywhere", False, ("true", True), "sometimes"),
    ("bridge", True, ("0", False), "2"),
    ("memory_budget", 512_000_000, ("2GB", 2_000_000_000), "0"),
    ("cache_bytes", 64_000_000, ("0", 0), "-1"),
    ("max_threads", 32, ("1", 1), "0"),
    ("async_concurrency", {}, ('{"m": 2}', {"m": 2}), "m=2"),
    ("async_concurrency", {}, ("{}", {}), '{"m": 0}'),
    ("user_agent", None, ("me/1", "me/1"), None),
    ("client_factory", None, ("httpx:AsyncClient", httpx.AsyncClient), "no.such:thing"),
]


def test_the_table_has_every_setting():
    """A new setting is tested too, and has a description."""
    assert {row[0] for row in TABLE} == set(Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(("name", "default", "given", "malformed"), TABLE)
def test_every_setting(monkeypatch, name, default, given, malformed):
    """Its default, from the environment, by configure() above that, and malformed in either."""
    variable = ENV_PREFIX + name.upper()
    text, value = given
    if name != "user_agent":
        assert getattr(current(), name) == default
    assert current().origin(name) == "default"

    monkeypatch.setenv(variable, text)
    assert getattr(reload(), name) == value
    assert current().origin(name) == variable

    with configure(**{name: getattr(Settings(), name)}) as settings:
        assert getattr(settings, name) == value
        assert settings.origin(name) == "configure()"
    assert current().origin(name) == variable

    if malformed is not None:
        monkeypatch.setenv(variable, malformed)
        with pytest.raises(ValueError, match=variable):
            reload()
        monkeypatch.delenv(variable)
        with pytest.raises(ValueError, match=rf"configure\({name}=...\) is "):
            configure(**{name: malformed})


def test_the_user_agent_names_the_library():
    """With its version, and where to read about it."""
    assert current().user_agent.startswith("llm-async-attachments/")
    assert current().user_agent.endswith(" (+https://llm.datasette.io/)")


def test_settings_are_read_once_until_they_are_read_again(monkeypatch):
    """A changed environment counts after reload(); what configure() set stays."""
    with configure(retries=1):
        before = current()
        monkeypatch.setenv(ENV_PREFIX + "RETRIES", "7")
        monkeypatch.setenv(ENV_PREFIX + "MAX_REDIRECTS", "7")
        assert current() is before
        assert (reload().retries, reload().max_redirects) == (1, 7)
    assert current().retries == 7


def test_configure_restores_what_was_before():
    """Nested, and when the block fails."""
    with configure(retries=5):
        with pytest.raises(ZeroDivisionError), configure(retries=6, max_bytes="1kB") as settings:
            assert (settings.retries, settings.max_bytes) == (6, 1000)
            1 / 0  # noqa: B018
        assert (current().retries, current().max_bytes) == (5, 50_000_000)
    assert current().retries == 2


def test_configure_without_a_block_stays():
    """Until the next one."""
    with configure():
        configure(retries=5)
        configure(max_redirects=1)
        assert (current().retries, current().max_redirects) == (5, 1)
    assert (current().retries, current().max_redirects) == (2, 5)


def test_configure_restores_although_the_environment_is_malformed_by_then(monkeypatch):
    """The overrides go; the malformed variable is told when settings are asked for."""
    with configure(retries=5):
        monkeypatch.setenv(ENV_PREFIX + "MAX_BYTES", "large")
    with pytest.raises(ValueError, match="MAX_BYTES is 'large'"):
        current()
    monkeypatch.delenv(ENV_PREFIX + "MAX_BYTES")
    assert current().retries == 2


def test_what_does_not_fit_changes_nothing():
    """A malformed value, or a name that is none, leaves all settings as they were."""
    before = current()
    with pytest.raises(ValueError, match="There is no setting 'max_byte'; there are max_bytes, "):
        configure(max_byte=1, retries=0)
    with pytest.raises(ValueError, match=r"configure\(guard=...\) is 'loud'"):
        configure(retries=0, guard="loud")
    assert current() is before


def test_every_malformed_variable_is_named(monkeypatch):
    """At once, not one after another."""
    monkeypatch.setenv(ENV_PREFIX + "RETRIES", "x")
    monkeypatch.setenv(ENV_PREFIX + "GUARD", "y")
    with pytest.raises(ValueError, match=r"(?s)RETRIES is 'x'.*GUARD is 'y'"):
        reload()


def test_a_client_factory_is_any_callable_or_its_name():
    """An object, or `module:name`; what cannot be called is refused."""
    with configure(client_factory=a_factory) as settings:
        assert settings.client_factory is a_factory
    with configure(client_factory="httpx:AsyncClient") as settings:
        assert settings.client_factory is httpx.AsyncClient
    with pytest.raises(ValueError, match="client_factory"):
        configure(client_factory=3)


def test_settings_cannot_be_changed_in_place():
    """configure() is the way."""
    with pytest.raises(ValueError, match="frozen"):
        current().retries = 5


@given(
    st.sampled_from([row[0] for row in TABLE if row[3] is not None and row[0] != "client_factory"]),
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_is_read_or_named(monkeypatch, name, text):
    """Whatever a variable holds, the settings are read, or a ValueError names it."""
    variable = ENV_PREFIX + name.upper()
    with monkeypatch.context() as patch:
        patch.setenv(variable, text)
        try:
            reload()
        except ValueError as error:
            assert variable in str(error)  # noqa: PT017
    reload()
