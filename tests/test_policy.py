"""Fetch or pass through: what is declared, seen and known of a model."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import llm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_async_attachments import BlockingFetchError, bridge, configure, policy, to_async
from llm_async_attachments.loopback import Generated, fixture
from llm_async_attachments.policy import KNOWN, Choice, Known, choose, matches, seen

pytestmark = pytest.mark.anyio

needs_greenlet = pytest.mark.skipif(not bridge.available(), reason="greenlet is not installed")
PNG = fixture("image.png")


class Model(llm.AsyncModel):
    """Asks for the bytes of its attachments if `asks`, and sends their URLs otherwise."""

    model_id = "model"
    attachment_types = frozenset({"image/png", "image/webp", "application/pdf"})

    def __init__(self, asks=False):
        self.asks = asks

    async def execute(self, prompt, stream, response, conversation):
        for attachment in prompt.attachments:
            yield str(len(attachment.content_bytes())) if self.asks else attachment.url


def of_class(**attributes):
    return type("Declared", (Model,), {"__module__": __name__, **attributes})()


def known_as(monkeypatch, cls, *patterns, sure=False):
    monkeypatch.setitem(KNOWN, f"{cls.__module__}.{cls.__qualname__}", Known(patterns, sure=sure))


# -- the order -----------------------------------------------------------------------------------


def test_without_any_knowledge_everything_is_fetched():
    """The default for an unknown model and type is to fetch."""
    assert choose(Model(), "image/png", can_wait=True) == Choice(False, "default")


def test_known_outranks_the_default(monkeypatch):
    """A row of the table passes the types it matches, for the class and its subclasses."""
    known_as(monkeypatch, Model, "image/*")
    assert choose(Model(), "image/png", can_wait=True) == Choice(True, "known")
    assert choose(of_class(), "image/webp", can_wait=True) == Choice(True, "known")
    assert choose(Model(), "application/pdf", can_wait=True) == Choice(False, "default")


@pytest.mark.parametrize("asked", [True, False])
def test_seen_outranks_known(monkeypatch, asked):
    """What a class did counts more than what the table says, either way."""
    known_as(monkeypatch, Model, "image/*")
    seen.note(Model, "image/png", asked=asked)
    seen.note(Model, "application/pdf", asked=asked)
    for type_ in ("image/png", "application/pdf"):
        assert choose(Model(), type_, can_wait=True) == Choice(not asked, "seen")
    assert choose(Model(), "image/webp", can_wait=True).reason == "known"


@pytest.mark.parametrize("declared", [True, {"image/*"}, ["image/png"], "image/png"])
def test_a_declaration_that_matches_outranks_what_was_seen(declared):
    """True or a matching pattern passes the type, whatever the class asked for before."""
    model = of_class(supports_attachment_urls=declared)
    seen.note(type(model), "image/png", asked=True)
    assert choose(model, "image/png", can_wait=True) == Choice(True, "declared")


def test_a_declared_false_always_fetches(monkeypatch):
    """False fetches a type that was never asked for and that is known to pass."""
    model = of_class(supports_attachment_urls=False)
    known_as(monkeypatch, type(model), "image/*", sure=True)
    seen.note(type(model), "image/png", asked=False)
    assert choose(model, "image/png", can_wait=True) == Choice(False, "declared")


def test_a_declaration_says_nothing_of_other_types():
    """A type that no pattern matches is decided by what was seen."""
    model = of_class(supports_attachment_urls={"image/*"})
    assert choose(model, "application/pdf", can_wait=True) == Choice(False, "default")
    seen.note(type(model), "application/pdf", asked=False)
    assert choose(model, "application/pdf", can_wait=True) == Choice(True, "seen")


def test_an_unknown_type_is_fetched_unless_all_are_declared():
    """Where nothing tells the type, only a declared True passes it."""
    assert not choose(of_class(supports_attachment_urls={"*/*"}), None, can_wait=True).passes
    assert choose(of_class(supports_attachment_urls=True), None, can_wait=True).passes


def test_where_nothing_can_wait_only_declared_and_sure_count(monkeypatch):
    """Without the bridge neither what was seen nor an unsure row is relied on."""

    class Sure(Model):
        pass

    unsure, sure = of_class(), Sure()
    known_as(monkeypatch, type(unsure), "image/*")
    seen.note(type(unsure), "image/webp", asked=False)
    for type_ in ("image/png", "image/webp"):
        assert choose(unsure, type_, can_wait=False) == Choice(False, "default")
    known_as(monkeypatch, type(sure), "image/*", sure=True)
    assert choose(sure, "image/png", can_wait=False) == Choice(True, "known")
    declared = of_class(supports_attachment_urls={"image/*"})
    assert choose(declared, "image/png", can_wait=False) == Choice(True, "declared")
    assert choose(declared, "application/pdf", can_wait=False) == Choice(False, "default")


def test_llms_own_openai_models_are_known_for_images():
    """Images pass for llm's own OpenAI classes, even where nothing can wait; PDFs do not."""
    from llm.default_plugins import openai_models

    names = [n for n in ("AsyncChat", "Chat", "AsyncResponses") if hasattr(openai_models, n)]
    assert "AsyncChat" in names
    for name in names:
        model = getattr(openai_models, name)("x", vision=True)
        assert choose(model, "image/png", can_wait=False) == Choice(True, "known")
        assert not choose(model, "application/pdf", can_wait=True).passes


# -- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "media_type", "expected"),
    [
        ({"image/*"}, "image/png", True),
        ({"image/*"}, "IMAGE/PNG", True),
        ({"Image/PNG"}, "image/png", True),
        ({"image/png"}, "image/png; charset=x", True),
        ({"*/*"}, "video/mp4", True),
        ("image/*", "image/png", True),
        ({"image/*"}, "imagex/png", False),
        ({"image/png"}, "image/pngx", False),
        (set(), "image/png", False),
        ({"*/*"}, None, False),
    ],
)
def test_patterns(patterns, media_type, expected):
    """A pattern matches the whole type without its parameters, whatever the case."""
    assert matches(patterns, media_type) is expected


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=8))
def test_having_asked_outweighs_in_any_order(notes):
    """A type is passed for what was seen only if it was never asked for, whatever the order."""
    learned = policy._Seen()
    for media_type, asked in notes:
        learned.note(Model, media_type, asked=asked)
    for media_type in "ab":
        of_type = [asked for t, asked in notes if t == media_type]
        assert learned.get(Model, media_type) == (any(of_type) if of_type else None)


def test_what_was_seen_does_not_keep_a_class_alive():
    """A class that is gone takes along what was seen of it."""
    import gc

    learned = policy._Seen()
    learned.note(of_class().__class__, "image/png", asked=True)
    gc.collect()
    assert len(learned._asked) == 0


# -- learning ------------------------------------------------------------------------------------


async def prompt(model, *urls, type="image/png"):
    attachments = [llm.Attachment(url=url, type=type) for url in urls]
    return await to_async(model).prompt("x", attachments=attachments).text()


@needs_greenlet
async def test_a_model_that_never_asked_is_given_the_url_from_then_on(media_host):
    """The first prompt fetches, the second of the same class passes the URL: no request."""
    assert await prompt(Model(), media_host.url("image.png?1"))
    assert media_host.count() == 1
    assert await prompt(Model(), media_host.url("image.png?2"))
    assert media_host.count() == 1


@needs_greenlet
async def test_an_untyped_attachment_is_then_not_read(media_host):
    """Once learned, an untyped URL costs one GET whose body is left."""
    await prompt(Model(), media_host.url("image.png"))
    url = media_host.add("/large.png", Generated(50_000_000))
    await prompt(Model(), url, type=None)
    media_host.settle()
    assert media_host.requests[-1].sent < 25_000_000
    assert media_host.count() == 2


async def test_a_model_that_asked_is_fetched_for_on_and_on(media_host):
    """One that reads the bytes gets them fetched before execute() each time, one request each."""
    for turn in range(3):
        text = await prompt(Model(asks=True), media_host.url(f"image.png?{turn}"))
        assert text == str(len(PNG))
        assert media_host.count() == turn + 1
    assert seen.get(Model, "image/png") is True


@needs_greenlet
async def test_a_late_demand_is_met_and_learned(media_host):
    """A class that was given URLs and asks after all is served, and fetched for from then on."""
    model = Model()
    await prompt(model, media_host.url("image.png?1"))
    assert choose(model, "image/png", can_wait=True) == Choice(True, "seen")
    model.asks = True
    assert await prompt(model, media_host.url("image.png?2")) == str(len(PNG))
    assert choose(model, "image/png", can_wait=True) == Choice(False, "seen")
    model.asks = False
    await prompt(model, media_host.url("image.png?3"))
    assert choose(model, "image/png", can_wait=True) == Choice(False, "seen"), "asked outweighs"


@needs_greenlet
async def test_what_is_learned_is_of_the_class_and_the_type(media_host):
    """Another object of the class profits, another class and another type do not."""
    await prompt(Model(), media_host.url("image.png"))
    assert choose(Model(), "image/png", can_wait=True).passes
    assert not choose(Model(), "application/pdf", can_wait=True).passes
    assert not choose(of_class(), "image/png", can_wait=True).passes


async def test_a_prompt_that_fails_teaches_nothing(media_host):
    """Only a finished execute() says that the bytes were not needed."""

    class Failing(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield "begun"
            raise RuntimeError("fails")

    with pytest.raises(RuntimeError, match="fails"):
        await prompt(Failing(), media_host.url("image.png"))
    assert seen.get(Failing, "image/png") is None


@needs_greenlet
async def test_a_demand_that_was_refused_is_learned(media_host):
    """Code where nothing can wait fails once; then its type is fetched ahead for it."""
    import asyncio

    class Spawning(Model):
        async def execute(self, prompt, stream, response, conversation):
            async def child():
                return len(prompt.attachments[0].content_bytes())

            yield str(await asyncio.create_task(child())) if self.asks else "not asked"

    model = Spawning()
    await prompt(model, media_host.url("image.png?1"))
    model.asks = True
    attachment = llm.Attachment(url=media_host.url("image.png?2"), type="image/png")
    response = to_async(model).prompt("x", attachments=[attachment])
    with pytest.raises(BlockingFetchError):
        await response.text()
    assert await response.text() == str(len(PNG)), "awaited again"
    assert await prompt(model, media_host.url("image.png?3")) == str(len(PNG))


async def test_asking_in_a_thread_counts(media_host):
    """Bytes that a thread of the model's asks for were asked for."""
    import asyncio

    class Threaded(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield str(len(await asyncio.to_thread(prompt.attachments[0].content_bytes)))

    await prompt(Threaded(), media_host.url("image.png"))
    assert seen.get(Threaded, "image/png") is True


async def test_what_was_seen_is_not_relied_on_without_the_bridge(media_host):
    """With bridge=False the second prompt fetches as the first did."""
    with configure(bridge=False):
        await prompt(Model(), media_host.url("image.png?1"))
        await prompt(Model(), media_host.url("image.png?2"))
    assert media_host.count() == 2


async def test_a_converted_model_is_learned_by_its_sync_class(media_host):
    """What a converted model did not ask for is noted of the class its author wrote, and passed
    from the second prompt on; a thread can always fetch, so no bridge is needed."""

    class Sync(llm.Model):
        model_id = "sync"
        attachment_types = frozenset({"image/png"})

        def execute(self, prompt, stream, response, conversation):
            yield prompt.attachments[0].url

    with configure(bridge=False):
        for turn in range(2):
            await prompt(Sync(), media_host.url(f"image.png?{turn}"))
    assert seen.get(Sync, "image/png") is False
    assert media_host.count() == 1
    assert policy.class_of(to_async(Sync())) is Sync


def test_a_rule_of_a_plugin_that_is_not_installed_costs_nothing():
    """The table is of names: nothing is imported for it."""
    code = """
    import sys, llm
    from llm_async_attachments import policy
    assert not {"llm_anthropic", "llm_mistral", "llm_gemini"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
