"""`llm async-attachments ...` as a user runs it: through llm's own command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import llm
import pytest
from click.testing import CliRunner, Result
from llm.cli import cli
from llm.plugins import pm

from llm_async_attachments import cli as our_cli
from llm_async_attachments import configure, plugin, settings
from llm_async_attachments.loopback import Generated, MediaHost

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
COMMANDS = ["demo", "inspect", "models", "settings"]


class Sync(llm.Model):
    """A sync-only model without a key."""

    can_stream = True

    def __init__(self, model_id: str, *attachment_types: str, **attributes: Any) -> None:
        self.model_id = model_id
        self.attachment_types = set(attachment_types)
        vars(self).update(attributes)

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Any:
        yield "ok"


class Keyed(llm.KeyModel):
    """A sync-only model with a key, that takes some types by URL and has a low cap."""

    model_id = "keyed"
    needs_key = "keyed"
    attachment_types = {"image/png", "image/jpeg", "application/pdf"}  # noqa: RUF012
    supports_attachment_urls = {"image/*"}  # noqa: RUF012
    max_attachment_bytes = 2000

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any, key: Any) -> Any:
        yield "ok"


class Native(llm.AsyncModel):
    """An async model that prepares its attachments itself."""

    model_id = "native"
    attachment_types = {"image/png"}  # noqa: RUF012
    supports_async_attachments = True

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Any:
        yield "ok"


class Plugin:
    """Registers a model of each kind."""

    __name__ = "Plugin"

    @llm.hookimpl
    def register_models(self, register: Any) -> None:
        register(Sync("local", "image/png", "image/gif", "application/pdf"), aliases=["here"])
        register(Sync("vendor/a-model-with-a-very-long-name-indeed:free", "audio/wav"))
        register(Keyed())
        register(Sync("native", "image/png"), Native())


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """This library and a plugin with a few models are registered with llm."""
    models = Plugin()
    ours = [] if pm.is_registered(plugin) else [plugin]  # not by its entry point, uninstalled
    if "async-attachments" not in cli.commands:
        plugin.register_commands(cli)
    for each in [models, *ours]:
        pm.register(each)
    yield
    for each in [models, *ours]:
        pm.unregister(each)


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(cli, ["async-attachments", *arguments], **options)


def rows(result: Result) -> list[str]:
    """The rows of a table, without its header and what follows it."""
    return result.stdout.split("\n\n")[0].splitlines()[1:]


# -- every command ------------------------------------------------------------------------------


def test_every_command_is_tested_here() -> None:
    """The list of commands is complete."""
    assert sorted(our_cli.group.commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    """`--help` says what a command does, what each option means, and how it is used."""
    result = run(name, "--help")

    assert result.exit_code == 0
    assert f"llm async-attachments {name}" in result.stdout.partition("Example:")[2]
    options = [p for p in our_cli.group.commands[name].params if isinstance(p, click.Option)]
    assert all(option.help for option in options)
    assert "..." not in our_cli.group.commands[name].get_short_help_str(limit=50)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    """README.md shows each command."""
    assert f"llm async-attachments {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("arguments", [["settings"], ["models"], ["inspect", "x"], ["demo"]])
@pytest.mark.parametrize(("name", "value"), [("MAX_BYTES", "lots"), ("ASYNC_CONCURRENCY", "x")])
def test_a_malformed_environment_variable_is_named(
    arguments: list[str], name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that cannot be read is a one-line error that names its variable."""
    with monkeypatch.context() as patch:
        patch.setenv(settings.ENV_PREFIX + name, value)
        patch.setattr(settings, "_settings", None)
        result = run(*arguments)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {settings.ENV_PREFIX}{name} is ")
    assert result.stdout == ""


def test_importing_the_commands_loads_nothing_heavy() -> None:
    """`llm --help` does not pay for what only the commands need."""
    heavy = [
        "pydantic_settings",
        "pybase64",
        "greenlet",
        *(f"llm_async_attachments.{name}" for name in ("settings", "fetch", "demo", "models")),
    ]
    code = (
        "import sys, llm.cli; before = set(sys.modules); import llm_async_attachments.cli; "
        f"print([name for name in {heavy!r} if name in set(sys.modules) - before])"
    )
    environment = {**os.environ, "LLM_LOAD_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )

    assert done.stdout == "[]\n", done.stderr


# -- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_each_attachment_in_the_order_given(media_host: MediaHost) -> None:
    """A row has type, where that came from, size, time and name, for URLs and for paths."""
    untyped = media_host.add("untyped", (FIXTURES / "image.webp").read_bytes(), type=None)
    text = media_host.add("notes.csv", b"a,b", type=None)
    path = str(FIXTURES / "sound.mp3")

    result = run("inspect", media_host.url("image.png"), path, untyped, text)

    assert result.exit_code == 0
    header, *found = (line.split() for line in result.stdout.splitlines())
    assert header == ["Type", "From", "Size", "Time", "Attachment"]
    assert found[0][:4] == ["image/png", "header", "1.43", "kB"]
    assert found[0][-1] == media_host.url("image.png")
    assert found[1][:4] == ["audio/mpeg", "path", "2.5", "kB"]
    assert found[1][-1] == path
    assert found[2][:5] == ["image/webp", "first", "bytes", "706", "bytes"]
    assert found[3][:4] == ["text/csv", "extension", "3", "bytes"]
    starts = {
        line.index(last)
        for line, (*_, last) in zip(result.stdout.splitlines(), [header, *found], strict=True)
    }
    assert len(starts) == 1, "the last column is not aligned"


def test_inspect_asks_once_and_all_together(media_host: MediaHost) -> None:
    """Each distinct URL is one GET, and none waits for another."""
    urls = [media_host.add(f"{n}.png", b"\x89PNG\r\n\x1a\n", delay=0.3) for n in range(8)]

    found = json.loads(run("inspect", "--json", *urls, urls[0]).stdout)

    assert [one["attachment"] for one in found] == [*urls, urls[0]]
    assert media_host.count() == media_host.count("GET") == 8
    assert media_host.most_at_once == 8


def test_inspect_stays_under_the_limit_of_fetches(media_host: MediaHost) -> None:
    """The setting max_concurrent_fetches holds, and waiting for a turn is not counted as time."""
    urls = [media_host.add(f"{n}.png", b"\x89PNG\r\n\x1a\n", delay=0.2) for n in range(6)]

    with configure(max_concurrent_fetches=2):
        found = json.loads(run("inspect", "--json", *urls).stdout)

    assert media_host.most_at_once == 2
    assert all(0.2 <= one["seconds"] < 0.4 for one in found)


def test_inspect_tells_the_error_of_one_on_its_line(media_host: MediaHost, tmp_path: Path) -> None:
    """What fails has the library's message, the others are shown, and the exit code is 1."""
    given = [
        media_host.url("nothing-here"),
        media_host.url("document.pdf"),
        str(tmp_path / "missing.txt"),
        str(tmp_path),
        "http://[::1",
        "file:///etc/passwd",
        media_host.add("short.pdf", b"%PDF", length=10_000),
    ]

    result = run("inspect", *given)

    assert result.exit_code == 1
    lines = rows(result)
    assert "its server answered 404 Not Found. Check the URL" in lines[0]
    assert lines[1].startswith("application/pdf")
    assert f"Could not read {tmp_path}/missing.txt: there is no such file" in lines[2]
    assert f"Could not read {tmp_path}: it is a directory" in lines[3]
    assert "the URL is malformed" in lines[4]
    assert "only http and https URLs can be fetched" in lines[5]
    assert "the server broke off" in lines[6]
    assert [line.startswith("error ") for line in lines] == [True, False, *[True] * 5]


def test_inspect_shows_an_unexpected_error_like_any_other(tmp_path: Path) -> None:
    """A client_factory that fails is told on the line of the attachment."""

    def factory() -> None:
        raise RuntimeError("no proxy today")

    with configure(client_factory=factory):
        result = run("inspect", "http://127.0.0.1:9/x", str(FIXTURES / "image.png"))

    assert result.exit_code == 1
    assert "RuntimeError (no proxy today)" in rows(result)[0]
    assert rows(result)[1].startswith("image/png")


def test_inspect_keeps_to_the_cap(media_host: MediaHost) -> None:
    """A larger body is refused: by its header unread, without a header where the cap is passed."""
    known = media_host.add("known.pdf", Generated(5_000_000, b"%PDF-1.7"))
    unknown = media_host.add("unknown.pdf", Generated(5_000_000, b"%PDF-1.7"), framing="chunked")

    result = run("inspect", "--json", "--max-bytes", "1MB", known, unknown)

    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert "is too large: 5 MB, the cap is 1 MB" in first["error"]
    assert "is too large: more than 1 MB, the cap is 1 MB" in second["error"]


def test_inspect_keeps_to_the_deadline(media_host: MediaHost) -> None:
    """A body that drips is given up after total_timeout."""
    slow = media_host.add("slow.pdf", b"%PDF" * 1000, pace=(1, 0.05))

    with configure(total_timeout=0.4):
        result = run("inspect", slow)

    assert result.exit_code == 1
    assert "it took longer than 0.4 s in all (setting total_timeout)" in result.stdout


def test_inspect_counts_what_was_read(media_host: MediaHost) -> None:
    """A size that no header tells is the true one."""
    url = media_host.add("a.pdf", Generated(3_000_000, b"%PDF-1.7"), framing="close")

    (found,) = json.loads(run("inspect", "--json", url).stdout)

    assert found.pop("seconds") > 0
    assert found == {
        "attachment": url,
        "type": "application/pdf",
        "type_from": "header",
        "size": 3_000_000,
        "error": None,
    }


def test_inspect_for_a_model_says_what_becomes_of_each(media_host: MediaHost) -> None:
    """With -m a row says passed through, fetched, read or refused, and why."""
    given = [
        media_host.url("image.png"),
        media_host.add("a.pdf", b"%PDF-1.7"),
        str(FIXTURES / "image.jpg"),
        media_host.url("image.gif"),
    ]

    result = run("inspect", "-m", "keyed", *given)

    assert result.exit_code == 0
    assert "With keyed" in result.stdout.splitlines()[0]
    passed, fetched, read, refused = rows(result)
    assert "passed through (declared)" in passed
    assert "fetched (default)" in fetched
    assert "read (local file)" in read
    assert "refused (type not supported)" in refused
    assert "\ndeclared: the class of the model says so" in result.stdout
    assert "\ndefault: nothing says that the model takes these by URL" in result.stdout


def test_inspect_for_a_model_leaves_unread_what_it_takes_by_url(media_host: MediaHost) -> None:
    """A body that is passed through is not read, whatever its size; its header gives the size."""
    url = media_host.add("large.png", Generated(60_000_000, b"\x89PNG\r\n\x1a\n"))

    (found,) = json.loads(run("inspect", "--json", "-m", "keyed", url).stdout)
    media_host.settle()

    assert (found["handling"], found["reason"]) == ("passed through", "declared")
    assert (found["size"], found["supported"], found["error"]) == (60_000_000, True, None)
    assert media_host.requests[-1].sent < 30_000_000


def test_inspect_for_a_model_uses_its_lower_cap(media_host: MediaHost) -> None:
    """The model's max_attachment_bytes holds where it is lower than the setting."""
    result = run("inspect", "-m", "keyed", media_host.url("document.pdf"))

    assert result.exit_code == 1
    assert "is too large: 2.42 kB, the cap is 2 kB" in result.stdout


def test_inspect_for_a_model_that_prepares_for_itself(media_host: MediaHost) -> None:
    """What the model awaits itself is not read here."""
    (found,) = json.loads(
        run("inspect", "--json", "-m", "native", media_host.url("image.png")).stdout
    )

    assert (found["handling"], found["reason"]) == (
        "left to the model",
        "supports_async_attachments",
    )


def test_inspect_knows_models_by_their_aliases() -> None:
    """-m takes an alias, as everywhere in llm."""
    assert "With local" in run("inspect", "-m", "here", str(FIXTURES / "image.png")).stdout


def test_inspect_names_llm_models_for_an_unknown_model() -> None:
    """A model that is not there is a one-line error that tells where to look."""
    result = run("inspect", "-m", "nope", "x")

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Unknown model: nope. The command `llm models` lists those that are installed\n"
    )


@pytest.mark.parametrize("size", ["lots", "-1", "0", ""])
def test_inspect_refuses_a_size_that_is_none(size: str) -> None:
    """--max-bytes is a positive size."""
    result = run("inspect", "--max-bytes", size, "x")

    assert result.exit_code == 2
    assert "is not a size, such as 200MB" in result.stderr


def test_inspect_reads_standard_input() -> None:
    """A dash stands for content that is piped in."""
    result = run("inspect", "-", input=(FIXTURES / "document.pdf").read_bytes())

    assert rows(result)[0].split()[:4] == ["application/pdf", "first", "bytes", "2.42"]
    assert rows(result)[0].endswith("  standard input")


def test_inspect_hides_the_secrets_of_a_url(media_host: MediaHost) -> None:
    """The table, which people paste, is without the query of a pre-signed URL."""
    result = run("inspect", media_host.url("image.png?signature=hidden"))

    assert result.stdout.rstrip().endswith("/image.png?...")


def test_inspect_as_a_command_of_its_own_process(media_host: MediaHost) -> None:
    """`llm async-attachments inspect` works as installed; when piped, it shows no progress."""
    done = subprocess.run(
        [sys.executable, "-m", "llm", "async-attachments", "inspect", media_host.url("image.png")],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("image/png  header  1.43 kB")
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_inspect_shows_progress_in_a_terminal(media_host: MediaHost) -> None:
    """Where stderr is a terminal, a line shows how far the bodies are read, and is then cleared."""
    import pty

    url = media_host.add("slow.pdf", Generated(2_000_000, b"%PDF-1.7"), pace=(200_000, 0.1))
    terminal, stderr = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "llm", "async-attachments", "inspect", url],
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=60,
    )
    os.close(stderr)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)

    assert done.returncode == 0, shown
    assert " of 2 MB, 0 of 1 done" in shown
    assert shown.endswith("\r")
    assert shown.split("\r")[-2].strip() == ""


# -- settings -----------------------------------------------------------------------------------


def test_settings_shows_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a value, an origin and a description; sizes are shown for people and exact."""
    monkeypatch.setenv(settings.ENV_PREFIX + "MAX_BYTES", "200MB")
    settings.reload()
    with configure(retries=7):
        result = run("settings")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name, field in settings.Settings.model_fields.items():
        at = next(i for i, line in enumerate(lines) if line.split()[0] == name)
        assert lines[at + 1].strip() == field.description
    text = " ".join(result.stdout.split())
    assert "max_bytes 200 MB (200000000 bytes) LLM_ASYNC_ATTACHMENTS_MAX_BYTES" in text
    assert "retries 7 configure()" in text
    assert "memory_budget 512 MB (512000000 bytes) default" in text


def test_settings_as_json_is_exact() -> None:
    """--json gives plain values: bytes, numbers, the import path of a factory."""
    with configure(client_factory="httpx:AsyncClient", async_concurrency={"gpt-4": 3}):
        facts = json.loads(run("settings", "--json").stdout)

    assert list(facts) == list(settings.Settings.model_fields)
    assert facts["max_bytes"] == {
        "value": 50_000_000,
        "origin": "default",
        "description": "largest body fetched from a URL",
        "environment": "LLM_ASYNC_ATTACHMENTS_MAX_BYTES",
    }
    assert facts["bridge"]["value"] is True
    assert facts["async_concurrency"]["value"] == {"gpt-4": 3}
    assert facts["client_factory"]["value"] == "httpx:AsyncClient"


# -- models -------------------------------------------------------------------------------------


def models(*arguments: str) -> dict[str, dict[str, Any]]:
    facts = json.loads(run("models", "--json", *arguments).stdout)
    return {fact["model_id"]: fact for fact in facts}


def test_models_tells_native_from_converted() -> None:
    """A sync-only model is shown as converted, by whom, and how many of its calls run at once."""
    facts = models()

    assert facts["local"] == {
        "model_id": "local",
        "aliases": ["here"],
        "form": "converted",
        "converted_by": "llm-async-attachments",
        "attachment_types": ["application/pdf", "image/gif", "image/png"],
        "by_url": {},
        "prepared_by_model": None,
        "max_bytes": 50_000_000,
        "concurrency": 1,
    }
    assert facts["keyed"]["concurrency"] == 32
    assert facts["native"]["form"] == "native"
    assert facts["native"]["converted_by"] is facts["native"]["concurrency"] is None


def test_models_shows_the_others_beside_a_malformed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that declares nonsense is marked, and told of in the JSON."""
    monkeypatch.setattr(Sync, "async_concurrency", 0, raising=False)

    assert "async_concurrency" in models()["local"]["concurrency"]
    assert re.search(r"^local +converted \(\?\)", run("models").stdout, re.M)


def test_models_tells_what_is_taken_by_url_and_why() -> None:
    """Declared on the class, or known of a released plugin; the lower cap is shown."""
    facts = models()

    assert facts["keyed"]["by_url"] == {"image/jpeg": "declared", "image/png": "declared"}
    assert facts["keyed"]["max_bytes"] == 2000
    assert facts["native"]["prepared_by_model"] == "supports_async_attachments"
    openai = facts["gpt-4o-mini"]
    assert set(openai["by_url"].values()) == {"known"}
    assert set(openai["by_url"]) == {
        t for t in openai["attachment_types"] if t != "application/pdf"
    }


def test_models_tells_what_was_seen() -> None:
    """A type that a model was seen to take by URL is shown so."""
    from llm_async_attachments import policy

    policy.seen.note(Sync, "image/gif", asked=False)

    assert models("-q", "local")["local"]["by_url"] == {"image/gif": "seen"}


def test_models_names_another_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What llm-all-models-async converted is not taken for a native model."""
    adapter = type("AsyncAdapter", (Native,), {"__module__": "llm_all_models_async"})
    entry = llm.ModelWithAliases(Sync("theirs"), adapter(), set())
    sync_only = llm.ModelWithAliases(Sync("left"), None, set())
    monkeypatch.setattr(llm, "get_models_with_aliases", lambda: [entry, sync_only])

    result = run("models", "--json")

    facts = json.loads(result.stdout)
    assert [f["form"] for f in facts] == ["converted", "sync only"]
    assert [f["converted_by"] for f in facts] == ["llm-all-models-async", None]


def test_models_queries_all_have_to_match() -> None:
    """-q narrows down by id or alias, like that of `llm models`."""
    assert list(models("-q", "HERE", "-q", "local")) == ["local"]
    nothing = run("models", "-q", "here", "-q", "keyed")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr) == (0, "", "No such model\n")


def test_models_as_a_table() -> None:
    """A row is short: types of a kind together, reasons in brackets, then a count by form."""
    result = run("models", "-q", "e")
    lines = {line.split()[0]: line.split() for line in rows(result)}

    assert result.stdout.split("\n")[0].split() == ["Model", "Async", "Takes", "By", "URL", "Cap"]
    assert " ".join(lines["local"][1:]) == "converted (1) image/*, pdf 50 MB"
    assert " ".join(lines["keyed"][1:]) == "converted (32) image/*, pdf image/* (declared) 2 kB"
    assert " ".join(lines["native"][1:]) == "native image/png (fetches itself) 50 MB"
    assert " converted by llm-async-attachments" in result.stdout


@pytest.mark.parametrize("width", [72, 80, 100, 120])
def test_models_fits_into_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, and no model id is broken."""
    monkeypatch.setattr(our_cli, "_width", lambda: width)

    result = run("models")

    assert max(map(len, rows(result))) <= width
    assert "vendor/a-model-with-a-very-long-name-indeed:free" in result.stdout
    assert all(id_ in result.stdout for id_ in ("local", "keyed", "native", "gpt-4o-mini"))


# -- demo ---------------------------------------------------------------------------------------


def test_demo_reports_what_it_measured() -> None:
    """The demo runs through llm's command line; its exit code is what its report says."""
    result = run("demo", "--urls", "2", "--delay", "0.2", "--json")

    report = json.loads(result.stdout)
    # Not that it is kept: how long the loop is held depends on what else this machine does.
    assert result.exit_code == (0 if report["kept"] else 1)
    assert (report["urls"], report["library"]["requests"]) == (2, 2)
    assert report["same_request_body"]


def test_demo_exits_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken promise is an exit code that a script can see; options reach the demo."""
    from llm_async_attachments import demo

    seen = []
    monkeypatch.setattr(demo, "main", lambda *arguments: seen.append(arguments) or 1)

    assert run("demo", "--urls", "3", "--delay", "0").exit_code == 1
    assert seen == [(3, 0.0, False)]


def test_demo_refuses_nonsense() -> None:
    """There is no demo of no URL."""
    assert run("demo", "--urls", "0").exit_code == 2
