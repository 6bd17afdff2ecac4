"""`llm async-attachments`: see it work, look at attachments, at settings and at models.

llm imports this for every command: what takes time is imported inside the commands.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click
import llm

if TYPE_CHECKING:
    from .fetch import Download, Fetcher
    from .settings import Settings

# How a Choice of the policy is told.
_REASONS = {
    "declared": "the class of the model says so (supports_attachment_urls)",
    "seen": "what the model did with these before, in this process",
    "known": "released versions of its plugin take these by URL",
    "default": "nothing says that the model takes these by URL",
}

json_option = click.option("json_output", "--json", is_flag=True, help="Output as JSON")


@click.group(name="async-attachments")
def group() -> None:
    """Attachments that never block, and an async form of every model

    \b
    Example:
        llm async-attachments demo
    """


# -- demo ---------------------------------------------------------------------------------------


@group.command()
@click.option("--urls", type=click.IntRange(1), default=8, show_default=True, help="Number of PDFs")
@click.option(
    "--delay",
    type=click.FloatRange(0),
    default=0.3,
    show_default=True,
    help="Seconds until the media host answers",
)
@json_option
@click.pass_context
def demo(context: click.Context, urls: int, delay: float, json_output: bool) -> None:
    """Compare plain llm with this library

    The same prompt, with PDFs by URL, goes through both. Everything is on this machine: a slow
    media host, a model API, and llm's own OpenAI plugin between them. No key is needed. The exit
    code is 1 if the library did not keep its promise.

    \b
    Example:
        llm async-attachments demo --urls 20 --delay 0.5
    """
    _settings()
    from .demo import main

    context.exit(main(urls, delay, json_output))


# -- inspect ------------------------------------------------------------------------------------


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes from text such as `200MB`."""
    if value is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        size = 0
    if size < 1:
        raise click.BadParameter(f"{value!r} is not a size, such as 200MB or 5000000")
    return size


@group.command()
@click.argument("attachments", nargs=-1, required=True, metavar="URL_OR_PATH...")
@click.option("model_id", "-m", "--model", metavar="MODEL", help="Say what this model would get")
@click.option(
    "--max-bytes",
    metavar="SIZE",
    callback=_size,
    help="Largest body to read, such as 200MB, in place of the setting max_bytes",
)
@json_option
@click.pass_context
def inspect(
    context: click.Context,
    attachments: tuple[str, ...],
    model_id: str | None,
    max_bytes: int | None,
    json_output: bool,
) -> None:
    """Show the type, size and time of attachments

    Each URL is requested once, all of them together, under the limits of a prompt; "-" is standard
    input. Bodies are read to their end, so that sizes are true; with -m only those that the model
    would have fetched. The exit code is 1 if any failed.

    \b
    Example:
        llm async-attachments inspect photo.jpg https://example.com/a.pdf -m gpt-4o
    """
    settings = _settings()
    model = _async_model(model_id) if model_id else None
    stdin = sys.stdin.buffer.read() if "-" in attachments else b""
    inspector = _Inspector(settings, model, max_bytes, stdin)
    import asyncio

    found = asyncio.run(inspector.run(attachments))
    if json_output:
        _echo_json([one.as_json(model) for one in found])
    else:
        click.echo("\n".join(_inspect_lines(found, model)))
    if any(one.error for one in found):
        context.exit(1)


@dataclass
class _Inspected:
    """What was found of one attachment."""

    given: str
    type: str | None = None
    type_from: str | None = None
    size: int | None = None
    seconds: float = 0.0
    handling: str | None = None
    reason: str | None = None
    error: str | None = None

    @property
    def is_url(self) -> bool:
        """As llm's own -a option tells URLs from paths."""
        return "://" in self.given

    def as_json(self, model: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "attachment": self.given,
            "type": self.type,
            "type_from": self.type_from,
            "size": self.size,
            "seconds": round(self.seconds, 4),
            "error": self.error,
        }
        if model is not None:
            supported = None if self.error else self.type in model.attachment_types
            facts.update(model=model.model_id, supported=supported)
            facts.update(handling=self.handling, reason=self.reason)
        return facts


class _Inspector:
    """Looks at attachments together, under the limits that a prompt to the model would have."""

    def __init__(self, settings: Settings, model: Any, max_bytes: int | None, stdin: bytes) -> None:
        from .prepare import cap_of

        self.settings = settings
        self.model = model
        self.stdin = stdin
        self.cap = cap_of(model, max_bytes)
        self.ended = 0
        self.reading: list[Download] = []

    async def run(self, given: Sequence[str]) -> list[_Inspected]:
        import anyio

        from .fetch import Fetcher
        from .offloop import in_thread

        if any("://" in name for name in given):
            await in_thread(_get_ready)
        found = {name: _Inspected(name) for name in given}  # the same one twice is one request
        slots = anyio.Semaphore(self.settings.max_concurrent_fetches)
        async with (
            Fetcher(self.settings, max_bytes=self.cap) as fetcher,
            self._indicator(len(found)),
            anyio.create_task_group() as tasks,
        ):
            for one in found.values():
                tasks.start_soon(self._inspect, one, fetcher, slots)
        return [found[name] for name in given]

    async def _inspect(self, one: _Inspected, fetcher: Fetcher, slots: Any) -> None:
        from .errors import AttachmentError

        async with slots:
            began = time.perf_counter()
            try:
                if one.given == "-":
                    self._look_at_stdin(one)
                elif one.is_url:
                    await self._look_at_url(one, fetcher)
                else:
                    await self._look_at_path(one)
            except AttachmentError as error:
                one.error = str(error)
            except Exception as error:  # of a client_factory, say; the others go on
                one.error = f"{one.given}: {type(error).__name__}: {error}"
            one.seconds = time.perf_counter() - began
            self.ended += 1

    def _look_at_stdin(self, one: _Inspected) -> None:
        from .errors import AttachmentError
        from .source import type_from_bytes

        if not self.stdin:
            raise AttachmentError("Standard input is empty")
        self._note(one, type_from_bytes(self.stdin), "content", len(self.stdin))

    async def _look_at_path(self, one: _Inspected) -> None:
        from .offloop import in_thread
        from .source import size_of_path, type_of_path

        size = await in_thread(size_of_path, one.given)
        self._note(one, await in_thread(type_of_path, one.given), "path", size)

    async def _look_at_url(self, one: _Inspected, fetcher: Fetcher) -> None:
        declared = self.model.attachment_types if self.model is not None else ()
        async with fetcher.open(one.given) as download:
            self._note(one, *await download.resolve_type(declared), download.length)
            if one.handling in (None, "fetched"):
                self.reading.append(download)
                one.size = await download.measure()

    def _note(self, one: _Inspected, type_: str | None, type_from: str, size: int | None) -> None:
        one.type, one.type_from, one.size = type_, type_from if type_ else None, size
        if self.model is not None:
            one.handling, one.reason = self._handling(one)

    def _handling(self, one: _Inspected) -> tuple[str, str]:
        """What becomes of an attachment in a prompt to the model, and why."""
        from .prepare import choose

        if one.type not in self.model.attachment_types:
            return "refused", "type not supported"
        if own := _own_preparation(self.model):
            return "left to the model", own
        if not one.is_url:
            return "read", "standard input" if one.given == "-" else "local file"
        choice = choose(self.model, one.type)
        return "passed through" if choice.passes else "fetched", choice.reason

    @asynccontextmanager
    async def _indicator(self, total: int) -> AsyncIterator[None]:
        """A line of the terminal that shows how far the bodies are read, while they are read."""
        if not sys.stderr.isatty():
            yield
            return
        import anyio

        async def show() -> None:
            while True:
                await anyio.sleep(0.1)
                if self.reading:
                    width = shutil.get_terminal_size().columns - 1
                    click.echo(f"\r{self._progress(total)[:width]:<{width}}", err=True, nl=False)

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(show)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()
        finally:  # not before `show()` has ended: it may have had its turn coming
            if self.reading:
                blank = " " * (shutil.get_terminal_size().columns - 1)
                click.echo(f"\r{blank}\r", err=True, nl=False)

    def _progress(self, total: int) -> str:
        from .source import size_text

        received = sum(download.received for download in self.reading)
        known = sum(download.length or download.received for download in self.reading)
        part = received / known if known else 1.0
        bar = "#" * int(part * 24)
        sizes = f"{size_text(received)} of {size_text(known)}"
        return f"[{bar:-<24}] {sizes}, {self.ended} of {total} done"


def _get_ready() -> None:
    """Spend the tenth of a second that comes before the first fetch, lest that seem slow."""
    import httpx  # noqa: F401

    from .fetch import tls_context

    tls_context()


def _inspect_lines(found: list[_Inspected], model: Any) -> list[str]:
    """One row for each attachment, whose name comes last as it may be long."""
    from .source import public_url, size_text

    words = {"content": "first bytes"}
    with_model = [f"With {model.model_id}"] if model is not None else []
    rows = [["Type", "From", "Size", "Time", *with_model, "Attachment"]]
    for one in found:
        name = public_url(one.given) if one.is_url else one.given
        handling = "" if one.handling is None else f"{one.handling} ({one.reason})"
        facts = [
            "error" if one.error else one.type or "unknown",
            "" if one.error else words.get(one.type_from or "", one.type_from or ""),
            "" if one.error else "unknown" if one.size is None else size_text(one.size),
            f"{one.seconds * 1000:,.0f} ms",
            *(["" if one.error else handling] if model is not None else ()),
        ]
        rows.append([*facts, one.error or ("standard input" if name == "-" else name)])
    lines = _table(rows, right=(2, 3))
    reasons = [r for r in _REASONS if any(one.reason == r for one in found)]
    if reasons:
        lines += ["", *(f"{reason}: {_REASONS[reason]}" for reason in reasons)]
    return lines


# -- settings -----------------------------------------------------------------------------------


@group.command("settings")
@json_option
def settings_(json_output: bool) -> None:
    """Show every setting and where it came from

    A setting is changed by its environment variable, or in Python by
    llm_async_attachments.configure(). Sizes are bytes or text such as 200MB.

    \b
    Example:
        LLM_ASYNC_ATTACHMENTS_MAX_BYTES=200MB llm async-attachments settings
    """
    settings = _settings()
    from .settings import ENV_PREFIX

    facts = {
        name: {
            "value": _plain(getattr(settings, name)),
            "origin": settings.origin(name),
            "description": field.description,
            "environment": ENV_PREFIX + name.upper(),
        }
        for name, field in type(settings).model_fields.items()
    }
    if json_output:
        _echo_json(facts)
        return
    width = max(map(len, facts))
    for name, fact in facts.items():
        click.echo(f"{name:<{width}}  {_value_text(getattr(settings, name)):<28}  {fact['origin']}")
        click.echo(f"{'':<{width}}  {fact['description']}")


def _plain(value: Any) -> Any:
    """A setting's value for JSON; an object goes by the name that its setting would have."""
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if callable(value):
        name = getattr(value, "__qualname__", repr(value))
        return f"{getattr(value, '__module__', '?')}:{name}"
    return value


def _value_text(value: Any) -> str:
    from pydantic import ByteSize

    from .source import size_text

    if isinstance(value, ByteSize):
        return f"{size_text(value)} ({int(value)} bytes)" if value >= 1000 else f"{value} bytes"
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    plain = _plain(value)
    if isinstance(plain, dict):
        return json.dumps(plain)
    return f"{plain:g}" if isinstance(plain, float) else str(plain)


# -- models -------------------------------------------------------------------------------------


@group.command()
@click.option(
    "queries",
    "-q",
    "--query",
    multiple=True,
    metavar="QUERY",
    help="Only models that match this text, as in llm models -q",
)
@json_option
def models(queries: tuple[str, ...], json_output: bool) -> None:
    """List models, native and converted

    Converted models are sync-only ones that run in worker threads. image/* stands for several types
    of one kind, pdf for application/pdf; --json names each. Why a type is taken by URL: declared
    (by the class of the model), seen (in this process) or known (of the released plugin).

    \b
    Example:
        llm async-attachments models -q gpt-4
    """
    _settings()  # a malformed one is told at once
    entries = llm.get_models_with_aliases()
    facts = [_model_facts(entry) for entry in entries if all(map(entry.matches, queries))]
    if json_output:
        _echo_json(facts)
    elif not facts:
        click.echo("No such model" if queries else "No models", err=True)
    else:
        click.echo("\n".join(_model_lines(facts)))


def _model_facts(entry: Any) -> dict[str, Any]:
    from .converted import Converted, concurrency
    from .prepare import cap_of, choose

    model = entry.async_model or entry.model
    converted_by = _converted_by(entry.async_model)
    form = "converted" if converted_by else "native" if entry.async_model else "sync only"
    types = sorted(model.attachment_types or ())
    own = _own_preparation(model) if entry.async_model else None
    at_once: int | str | None = None
    if isinstance(model, Converted):
        try:
            at_once = concurrency(model.sync_model)
        except ValueError as error:  # a plugin's mistake is no reason to hide the other models
            at_once = str(error)
    choices = {} if own else {t: choose(model, t) for t in types}
    return {
        "model_id": model.model_id,
        "aliases": sorted(entry.aliases),
        "form": form,
        "converted_by": converted_by,
        "attachment_types": types,
        "by_url": {t: choice.reason for t, choice in choices.items() if choice.passes},
        "prepared_by_model": own,
        "max_bytes": cap_of(model),
        "concurrency": at_once,
    }


def _converted_by(async_model: Any) -> str | None:
    """The distribution that made an async model of a sync-only one."""
    from .converted import Converted

    if isinstance(async_model, Converted):
        return "llm-async-attachments"
    package = type(async_model).__module__.partition(".")[0]
    return "llm-all-models-async" if package == "llm_all_models_async" else None


def _model_lines(facts: list[dict[str, Any]]) -> list[str]:
    from .source import size_text

    rows = [["Model", "Async", "Takes", "By URL", "Cap"]]
    for fact in facts:
        types, at_once = fact["attachment_types"], fact["concurrency"]
        at_once = "?" if isinstance(at_once, str) else at_once
        rows.append(
            [
                fact["model_id"],
                fact["form"] if at_once is None else f"{fact['form']} ({at_once})",
                ", ".join(_grouped(types, types)),
                _by_url(fact),
                size_text(fact["max_bytes"]) if types else "",
            ]
        )
    lines = _table(rows, right=(4,), wrap=(2, 3), width=_width())
    forms = [
        f"{f['form']} by {f['converted_by']}" if f["converted_by"] else f["form"] for f in facts
    ]
    counts = ", ".join(f"{forms.count(form)} {form}" for form in sorted(set(forms), reverse=True))
    lines += ["", f"{len(facts)} model{'s' * (len(facts) != 1)}: {counts}"]
    if any(fact["concurrency"] is not None for fact in facts):
        lines.append("In brackets: how many calls of a converted model run at once")
    return lines


def _by_url(fact: dict[str, Any]) -> str:
    if fact["prepared_by_model"]:
        return "(fetches itself)"
    types, by_url = fact["attachment_types"], fact["by_url"]
    parts = []
    for reason in _REASONS:
        mine = [t for t in types if by_url.get(t) == reason]
        names = ["all"] if mine == types and len(types) > 1 else _grouped(mine, types)
        parts += [f"{', '.join(names)} ({reason})"] if mine else []
    return ", ".join(parts)


def _grouped(types: list[str], every: list[str]) -> list[str]:
    """Media types made short: `image/*` for all of a kind if they are several, `pdf`."""
    shown = []
    for kind in sorted({t.partition("/")[0] for t in types}):
        mine = [t for t in types if t.startswith(f"{kind}/")]
        whole = len(mine) == sum(t.startswith(f"{kind}/") for t in every)
        # application/* would say nothing where it stands for two
        several = len(mine) > (2 if kind == "application" else 1)
        shown += [f"{kind}/*"] if several and whole else mine
    return sorted(name.removeprefix("application/") for name in shown)


# -- what a model does with attachments ---------------------------------------------------------


def _async_model(model_id: str) -> Any:
    try:
        return llm.get_async_model(model_id)
    except llm.UnknownModelError as error:
        raise click.ClickException(
            f"{error.args[0]}. The command `llm models` lists those that are installed"
        ) from None


def _own_preparation(model: Any) -> str | None:
    """What a model's class declares to prepare its attachments itself, if it does."""
    if getattr(model, "prepare_attachments", None) is not None:
        return "own prepare_attachments()"
    if getattr(model, "supports_async_attachments", False):
        return "supports_async_attachments"
    return None


# -- for all ------------------------------------------------------------------------------------


def _settings() -> Settings:
    from .settings import current

    try:
        return current()
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def _echo_json(facts: Any) -> None:
    click.echo(json.dumps(facts, indent=2, default=str))


def _width() -> int | None:
    """The width of the terminal, None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _table(
    rows: list[list[str]],
    *,
    right: Iterable[int] = (),
    wrap: Sequence[int] = (),
    width: int | None = None,
) -> list[str]:
    """Aligned lines. If they are wider than `width`, the columns in `wrap` are folded, and what is
    too long in the first column gets a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gaps = 2 * (len(widths) - 1)
    if width is not None and sum(widths) + gaps > width:
        names = min(widths[0], width * 3 // 10)
        for _ in range(names + sum(widths[1:]) + gaps - width):
            widest = max(wrap, key=lambda i: widths[i])
            widths[widest] = max(widths[widest] - 1, 12)
        widths[0] = min(widths[0], max(width - gaps - sum(widths[1:]), names))
    lines = []
    for first, *rest in rows:
        cells = [
            textwrap.wrap(cell, widths[i], break_on_hyphens=False) if i in wrap else [cell]
            for i, cell in enumerate(rest, 1)
        ]
        if len(first) > widths[0]:
            lines.append(first)
            first = ""
        for parts in zip_longest([first], *cells, fillvalue=""):
            padded = [
                part.rjust(widths[i]) if i in right else part.ljust(widths[i])
                for i, part in enumerate(parts)
            ]
            lines.append("  ".join(padded).rstrip())
    return lines
