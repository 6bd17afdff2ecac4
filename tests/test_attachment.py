"""Attachments that are awaited, and attachments that answer from memory."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import os
import pickle
import threading
from contextlib import aclosing
from pathlib import Path

import llm
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyleak import no_event_loop_blocking, no_task_leaks

from llm_async_attachments import (
    AsyncAttachment,
    AttachmentError,
    AttachmentFetchError,
    AttachmentTooLarge,
    configure,
    to_async,
)
from llm_async_attachments.attachment import PreparedAttachment
from llm_async_attachments.loopback import Generated, MediaHost, fixture, gzipped

pytestmark = pytest.mark.anyio

PNG = fixture("image.png")
PDF = fixture("document.pdf")


@pytest.fixture
def host():
    with MediaHost() as host:
        yield host


@pytest.fixture
def png_path(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    return str(path)


@pytest.fixture(params=["url", "path", "content"])
def source(request, host, png_path):
    "The fields of an attachment that leads to the same picture."
    return {
        "url": {"url": host.url("image.png")},
        "path": {"path": png_path},
        "content": {"content": PNG},
    }[request.param]


async def until(condition):
    async with asyncio.timeout(5) if hasattr(asyncio, "timeout") else _nothing():
        while not condition():
            await asyncio.sleep(0.001)


class _nothing:
    async def __aenter__(self):
        pass

    async def __aexit__(self, *_):
        pass


async def cancelled(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- what the methods give ----------------------------------------------------------------------


async def test_the_methods_give_what_those_of_llm_give(source):
    """resolve_type, content_bytes, base64_content and id, from every source."""
    attachment, stock = AsyncAttachment(**source), llm.Attachment(**source)
    assert await attachment.id() == stock.id()
    assert await attachment.resolve_type() == "image/png"
    assert await attachment.content_bytes() == stock.content_bytes() == PNG
    assert await attachment.base64_content() == stock.base64_content()
    assert attachment.type == "image/png"
    assert attachment.content is source.get("content")


async def test_a_given_type_costs_nothing(host):
    """A typed attachment tells its type without a request, and so does an id of a URL."""
    attachment = AsyncAttachment(type="x/y", url=host.url("image.png"))
    assert await attachment.resolve_type() == "x/y"
    assert await attachment.id() == llm.Attachment(url=host.url("image.png")).id()
    assert host.count() == 0
    assert (await attachment.prepare()).type == "x/y"


async def test_a_type_is_resolved_without_the_body(host):
    """200 MB are not read for it, whatever the cap, and it is asked for once."""
    attachment = AsyncAttachment(url=host.add("x.pdf", Generated(200_000_000, b"%PDF-1.7")))
    assert await attachment.resolve_type() == "application/pdf"
    assert await attachment.resolve_type() == "application/pdf"
    assert host.count() == 1
    host.settle()
    assert host.requests[0].sent < 20_000_000


async def test_the_body_is_fetched_once(host):
    """The methods after the first answer from memory."""
    attachment = AsyncAttachment(url=host.url("image.png"))
    first = await attachment.prepare()
    assert await attachment.content_bytes() is first.content_bytes()
    assert await attachment.prepare() is first
    assert await attachment.resolve_type() == "image/png"
    assert host.count() == 1


async def test_a_type_that_nothing_tells_is_none(host, tmp_path):
    """None, as llm gives it."""
    path = tmp_path / "x"
    path.write_bytes(b"\x00\x01")
    for fields in ({"url": host.add("x", b"\x00\x01", type=None)}, {"path": str(path)}):
        assert await AsyncAttachment(**fields).resolve_type() is None
    assert await AsyncAttachment(content=b"\x00\x01").resolve_type() is None


async def test_an_empty_file_is_an_attachment_without_a_type(tmp_path):
    """Its bytes are empty, and so are those of an empty body."""
    path = tmp_path / "empty"
    path.touch()
    prepared = await AsyncAttachment(path=str(path)).prepare()
    assert (prepared.content_bytes(), prepared.type, prepared.base64_content()) == (b"", None, "")


async def test_a_path_may_be_a_path_object(png_path):
    """As llm takes it."""
    attachment = AsyncAttachment(path=Path(png_path))
    assert await attachment.content_bytes() == PNG
    assert b"".join([piece async for piece in attachment.stream()]) == PNG


# -- awaiters share -----------------------------------------------------------------------------


async def test_awaiters_share_one_fetch(host):
    """Ten awaiters of different methods cost one request."""
    attachment = AsyncAttachment(url=host.add("x.png", PNG, delay=0.05))
    methods = [attachment.content_bytes, attachment.base64_content, attachment.prepare] * 3
    results = await asyncio.gather(attachment.resolve_type(), *(method() for method in methods))
    assert results[:2] == ["image/png", PNG]
    assert host.count() == 1


async def test_caps_do_not_get_in_each_others_way(host):
    """Who asks with a lower cap is refused, the others are served, each with one request."""
    attachment = AsyncAttachment(url=host.add("x.png", PNG, delay=0.05))
    low, high, type_ = await asyncio.gather(
        attachment.prepare(max_bytes=10),
        attachment.prepare(max_bytes=10_000),
        attachment.resolve_type(),
        return_exceptions=True,
    )
    assert isinstance(low, AttachmentTooLarge)
    assert high.content_bytes() == PNG
    assert type_ == "image/png"
    assert host.count() <= 3
    with pytest.raises(AttachmentTooLarge):
        await attachment.prepare(max_bytes=10)
    assert host.count() <= 3


async def test_a_cancelled_awaiter_does_not_fail_the_others(host):
    """One leaves in the middle of the body; the other gets all of it, from one request."""
    go = threading.Event()
    attachment = AsyncAttachment(url=host.add("x.png", PNG, stall_at=100, stall=go))
    first, second = (asyncio.create_task(attachment.content_bytes()) for _ in range(2))
    await until(lambda: host.count() == 1)
    await cancelled(first)
    go.set()
    assert await second == PNG
    assert host.count() == 1


async def test_who_comes_while_an_abandoned_fetch_is_being_ended_gets_a_new_one(host):
    """Nobody joins a fetch that its last awaiter has cancelled."""
    go = threading.Event()
    for turns in range(8):
        attachment = AsyncAttachment(url=host.add(f"{turns}.png", PNG, stall_at=100, stall=go))
        host.clear()
        first = asyncio.create_task(attachment.content_bytes())
        await until(lambda: host.count() == 1)
        first.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        second = asyncio.create_task(attachment.content_bytes())
        await until(lambda: host.count() == 2)
        go.set()
        assert await second == PNG
        assert first.cancelled()
        go.clear()


async def test_when_all_awaiters_leave_the_fetch_ends(host):
    """The connection is closed and no task is left; the attachment can be asked again."""
    async with no_task_leaks(action="raise"):
        url = host.sequence("x.png", lambda _: stalled, PNG)
        stalled = asyncio.Event().wait()  # an answer that never comes
        attachment = AsyncAttachment(url=url)
        tasks = [asyncio.create_task(attachment.content_bytes()) for _ in range(3)]
        await until(lambda: host.count() == 1)
        for task in tasks:
            await cancelled(task)
    stalled.close()
    assert await attachment.content_bytes() == PNG


async def test_a_failed_fetch_can_be_asked_for_again(host):
    """All awaiters get the error; the next one a new fetch."""
    from llm_async_attachments.loopback import Reply

    attachment = AsyncAttachment(url=host.sequence("x.png", Reply(status=404, delay=0.05), PNG))
    errors = await asyncio.gather(
        attachment.content_bytes(), attachment.resolve_type(), return_exceptions=True
    )
    assert [type(error) for error in errors] == [AttachmentFetchError] * 2
    assert host.count() == 1
    assert await attachment.content_bytes() == PNG


def test_a_second_event_loop_can_use_it(host):
    """After one loop ended, in mid-fetch or not, another one goes on."""
    attachment = AsyncAttachment(url=host.add("x.png", PNG, delay=0.05))

    async def leave():
        task = asyncio.create_task(attachment.content_bytes())
        await asyncio.sleep(0.01)
        assert not task.done()

    asyncio.run(leave())
    assert asyncio.run(attachment.content_bytes()) == PNG
    assert asyncio.run(attachment.content_bytes()) == PNG


# -- stream and save ----------------------------------------------------------------------------


async def test_stream_gives_the_bytes_in_pieces(source):
    """From every source, and again."""
    attachment = AsyncAttachment(**source)
    for _ in range(2):
        assert b"".join([piece async for piece in attachment.stream()]) == PNG
    assert attachment.type in (None, "image/png")


async def test_stream_has_no_cap_and_keeps_nothing(host, tmp_path):
    """A body over max_bytes comes in pieces of at most a megabyte."""
    size, path = 5_000_000, tmp_path / "large"
    path.write_bytes(bytes(size))
    url = host.add("x.pdf", Generated(size))
    with configure(max_bytes=1000):
        for attachment in (AsyncAttachment(url=url), AsyncAttachment(path=str(path))):
            lengths = [len(piece) async for piece in attachment.stream()]
            assert sum(lengths) == size
            assert 0 < max(lengths) <= 1_048_576
            assert attachment._loaded is None


async def test_stream_uses_what_is_held(host):
    """What was fetched before is not fetched again."""
    attachment = AsyncAttachment(url=host.url("image.png"))
    await attachment.prepare()
    assert b"".join([piece async for piece in attachment.stream()]) == PNG
    assert host.count() == 1


async def test_stream_decodes_and_notes_the_type(host):
    """The pieces are those of the decoded body, and the type is known afterwards."""
    url = host.add("x", gzipped(PDF), type=None, headers={"Content-Encoding": "gzip"})
    attachment = AsyncAttachment(url=url)
    assert b"".join([piece async for piece in attachment.stream()]) == PDF
    assert await attachment.resolve_type() == "application/pdf"
    assert host.count() == 1


async def test_a_stream_that_is_left_closes_its_connection(host):
    """The rest of the body is not sent."""
    attachment = AsyncAttachment(url=host.add("x.pdf", Generated(200_000_000)))
    async with no_task_leaks(action="raise"), aclosing(attachment.stream()) as pieces:
        async for _ in pieces:
            break
    await asyncio.to_thread(host.settle)
    assert host.requests[0].sent < 20_000_000


async def test_a_stream_lasts_as_long_as_bytes_come(host):
    """read_timeout bounds each read of a stream, total_timeout does not bound the whole."""
    url = host.add("x", PDF[:20], type="x/y", pace=(1, 0.03))
    with configure(total_timeout=0.3, read_timeout=5):
        assert b"".join([p async for p in AsyncAttachment(url=url).stream()]) == PDF[:20]
    url = host.add("x", PDF, type="x/y", stall_at=100)
    with configure(read_timeout=0.1), pytest.raises(AttachmentFetchError, match="read_timeout"):
        [p async for p in AsyncAttachment(url=url).stream()]


async def test_save_writes_the_file(source, tmp_path):
    """Complete, with nothing beside it, also over a file that was there."""
    target = tmp_path / "out" / ("n" * 250)  # as long as a name may be
    target.parent.mkdir()
    for _ in range(2):
        assert await AsyncAttachment(**source).save(target) == target
        assert target.read_bytes() == PNG
    assert await AsyncAttachment(**source).save(str(target)) == target
    assert os.listdir(target.parent) == [target.name]


async def test_save_has_no_cap(host, tmp_path):
    """What is too large for memory goes to the disk."""
    attachment = AsyncAttachment(url=host.add("x.pdf", Generated(5_000_000, b"%PDF-1.7")))
    with configure(max_bytes=1000):
        path = await attachment.save(tmp_path / "x.pdf")
    assert path.stat().st_size == 5_000_000


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize(
    "fault", [{"status": 404}, {"close_at": 1000}, {"length": 10**6}, {"reset_at": 100}]
)
async def test_a_failed_download_leaves_no_file(host, tmp_path, fault, before):
    """What was there before stays as it was."""
    target = tmp_path / "out" / "x.pdf"
    target.parent.mkdir()
    if before:
        target.write_bytes(before)
    attachment = AsyncAttachment(url=host.add("x.pdf", PDF, **fault))
    with configure(retries=0), pytest.raises(AttachmentFetchError):
        await attachment.save(target)
    assert {path.read_bytes() for path in target.parent.iterdir()} == (
        {before} if before else set()
    )


async def test_a_cancelled_download_leaves_no_file(host, tmp_path):
    """Nor an open connection, task or thread at work."""
    target = tmp_path / "out" / "x.pdf"
    target.parent.mkdir()
    attachment = AsyncAttachment(url=host.add("x.pdf", PDF, stall_at=1000))
    async with no_task_leaks(action="raise"):
        task = asyncio.create_task(attachment.save(target))
        await until(lambda: host.count() == 1)
        await asyncio.sleep(0.05)
        await cancelled(task)
    assert os.listdir(target.parent) == []
    await asyncio.to_thread(host.settle)


@pytest.mark.parametrize("mode", ["open", "replace"])
async def test_a_save_that_is_cancelled_while_the_disk_works_leaves_no_part(
    host, tmp_path, monkeypatch, mode
):
    """The thread that makes the file is waited for, and the part removed."""
    begun, go = threading.Event(), threading.Event()
    owner, name = (Path, "open") if mode == "open" else (os, "replace")
    real = getattr(owner, name)

    def slow(*args, **options):
        begun.set()
        go.wait()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, slow)
    target = tmp_path / "out" / "x.png"
    target.parent.mkdir()
    task = asyncio.create_task(AsyncAttachment(content=PNG).save(target))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0.02)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(target.parent) == ([] if mode == "open" else ["x.png"])


@pytest.mark.parametrize("place", ["missing/x.png", "", "file/x.png", "nul\0x", "n" * 300])
async def test_a_place_that_cannot_be_written_to(tmp_path, place):
    """It is an AttachmentError that names it, and leaves nothing."""
    (tmp_path / "file").touch()
    with pytest.raises(AttachmentError, match="Could not save content of") as caught:
        await AsyncAttachment(content=PNG).save(f"{tmp_path}/{place}")
    assert not isinstance(caught.value, (OSError, ValueError))
    assert sorted(os.listdir(tmp_path)) == ["file"]


async def test_saves_to_one_place_do_not_mix(host, tmp_path):
    """Two at once: the last one to end wins, whole."""
    urls = [host.add(f"{n}", bytes([n]) * 100_000, pace=(20_000, 0)) for n in range(4)]
    target = tmp_path / "out"
    await asyncio.gather(*(AsyncAttachment(url=url).save(target) for url in urls))
    data = target.read_bytes()
    assert (len(data), len(set(data))) == (100_000, 1)
    assert not list(tmp_path.glob(".*.part"))


# -- errors -------------------------------------------------------------------------------------

METHODS = ("resolve_type", "content_bytes", "base64_content", "prepare", "save", "stream")


async def use(attachment, method, tmp_path):
    if method == "stream":
        return [piece async for piece in attachment.stream()]
    return await getattr(attachment, method)(*([tmp_path / "saved"] if method == "save" else []))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{}, {"content": b""}, {"path": "", "url": ""}])
async def test_an_empty_attachment(method, fields, tmp_path):
    """No content, path or URL: every method says so."""
    with pytest.raises(AttachmentError, match="no content, path or URL: give one of them"):
        await use(AsyncAttachment(**fields), method, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("missing.png", "there is no such file. Check path="),
        ("", "it is a directory. Give the path of a file"),
        ("file/x.png", "Not a directory. Check path="),
        ("nul\0x", "Check path="),
        ("n" * 300, "name too long. Check path="),
    ],
)
async def test_a_path_that_cannot_be_read(method, path, text, tmp_path):
    """Missing, a directory, not a path at all: what it is and what to do, from every method."""
    (tmp_path / "file").touch()
    path = f"{tmp_path}/{path}"
    with pytest.raises(AttachmentFetchError) as caught:
        await use(AsyncAttachment(path=path), method, tmp_path)
    assert str(caught.value).startswith(f"Could not read {path}: ")
    assert text in str(caught.value)
    assert caught.value.attachment == path


async def test_a_path_without_permission(monkeypatch, png_path):
    """It says so; simulated, for root may read everything."""

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AttachmentFetchError, match=r"may not be read\. Check its permissions"):
        await AsyncAttachment(path=png_path).content_bytes()


@pytest.mark.parametrize("method", METHODS)
async def test_an_error_of_a_url_names_it_without_its_secrets(host, method, tmp_path):
    """From every method."""
    url = host.url("missing?signature=s3cret").replace("//", "//u:pa55word@")
    with pytest.raises(AttachmentFetchError, match="404") as caught:
        await use(AsyncAttachment(url=url), method, tmp_path)
    assert "s3cret" not in str(caught.value)
    assert "pa55word" not in str(caught.value)
    assert "s3cret" not in repr(AsyncAttachment(url=url))


async def test_the_cap(host):
    """max_bytes of prepare(), else the setting; content and paths have none."""
    attachment = AsyncAttachment(url=host.url("image.png"))
    with configure(max_bytes=100):
        with pytest.raises(AttachmentTooLarge) as caught:
            await attachment.content_bytes()
        assert (caught.value.size, caught.value.max_bytes) == (len(PNG), 100)
        assert ".save()" in str(caught.value)
        assert (await attachment.prepare(max_bytes=10_000)).content_bytes() == PNG
        with pytest.raises(AttachmentTooLarge):
            await attachment.base64_content()
        assert await attachment.resolve_type() == "image/png"
        assert (await AsyncAttachment(content=PNG).prepare(max_bytes=1)).size == len(PNG)
    assert host.count() == 2


# -- AsyncAttachment as an object ---------------------------------------------------------------


def test_equality_and_repr():
    """By the four fields; the repr says which, without bytes or secrets."""
    assert AsyncAttachment(url="u", type="t") == AsyncAttachment(url="u", type="t")
    assert AsyncAttachment(url="u") != AsyncAttachment(url="v")
    assert repr(AsyncAttachment("image/png", content=PNG)) == (
        "<AsyncAttachment: content of 1.43 kB, type image/png>"
    )
    assert AsyncAttachment("t", "p", "u", b"c") == AsyncAttachment(
        type="t", path="p", url="u", content=b"c"
    )
    with pytest.raises(TypeError):
        hash(AsyncAttachment(url="u"))


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
async def test_copies_are_independent_and_keep_what_was_fetched(host, again):
    """Also while a fetch is under way, and of one that to_async() made."""
    go = threading.Event()
    url = host.add("x.png", PNG, stall_at=100, stall=go)
    attachment = to_async(llm.Attachment(url=url))
    task = asyncio.create_task(attachment.content_bytes())
    await until(lambda: host.count() == 1)
    early = again(attachment)
    assert early == AsyncAttachment(url=url)
    go.set()
    assert await task == PNG
    late = again(attachment)
    assert late == attachment
    assert await late.content_bytes() == PNG
    assert host.count() == 1
    assert await early.content_bytes() == PNG
    assert host.count() == 2


async def test_to_async_notes_the_type_on_the_original(host):
    """The caller's attachment gets its type if it had none, and never content."""
    original = llm.Attachment(url=host.url("image.png"))
    attachment = to_async(original)
    assert await attachment.content_bytes() == PNG
    assert (original.type, original.content) == ("image/png", None)
    assert to_async(attachment) is attachment
    typed = llm.Attachment(type="x/y", url=host.url("image.png"))
    await to_async(typed).content_bytes()
    assert typed.type == "x/y"


async def test_to_async_of_a_prepared_attachment_answers_from_memory(host):
    """No second request."""
    prepared = await AsyncAttachment(url=host.url("image.png")).prepare()
    assert await to_async(prepared).content_bytes() == PNG
    assert host.count() == 1


# -- PreparedAttachment -------------------------------------------------------------------------


async def test_a_prepared_attachment_is_an_attachment(source):
    """Equal to llm's own with the same fields, both ways round; true, unhashable, no content."""
    prepared = await AsyncAttachment(**source).prepare()
    same = llm.Attachment(type="image/png", **source)
    assert isinstance(prepared, llm.Attachment)
    assert prepared == same
    assert same == prepared
    assert (prepared != same) is False
    assert prepared != llm.Attachment(type="image/gif", **source)
    assert llm.Attachment(type="image/gif", **source) != prepared
    assert prepared != "x"
    assert prepared
    assert prepared in [same]
    assert prepared.content == source.get("content")
    with pytest.raises(TypeError):
        hash(prepared)
    assert repr(prepared).startswith("<Attachment: ") or "PreparedAttachment" in repr(prepared)


async def test_a_prepared_attachment_answers_from_memory(source, host, monkeypatch):
    """Everything it can be asked for, without I/O; its id is the one that llm's logs use."""
    prepared = await AsyncAttachment(**source).prepare()
    expected = llm.Attachment(**source).id()
    host.close()
    monkeypatch.setattr(Path, "read_bytes", None)
    assert prepared.held
    assert prepared.size == len(PNG)
    assert prepared.resolve_type() == prepared.type == "image/png"
    assert prepared.content_bytes() == PNG
    assert prepared.base64_content() == base64.b64encode(PNG).decode()
    assert prepared.base64_content() is prepared.base64_content()
    assert prepared.id() == expected
    assert prepared.type_from == {"url": "header"}.get(next(iter(source)), next(iter(source)))


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
async def test_a_prepared_attachment_can_be_copied(source, again):
    """With its bytes."""
    prepared = await AsyncAttachment(**source).prepare()
    twin = again(prepared)
    assert type(twin) is PreparedAttachment
    assert twin == prepared
    assert (twin.content_bytes(), twin.id()) == (PNG, prepared.id())


async def test_the_id_of_a_large_file_is_hashed_off_the_loop(tmp_path, monkeypatch):
    """It is there when it is asked for."""
    path, data = tmp_path / "large", os.urandom(2_000_000)
    path.write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    prepared = [
        await AsyncAttachment(path=str(path)).prepare(),
        await AsyncAttachment(content=data).prepare(),
    ]
    monkeypatch.setattr(hashlib, "sha256", None)
    assert [p.id() for p in prepared] == [expected] * 2


@given(st.binary(min_size=1, max_size=500))
def test_any_content_can_be_prepared(data):
    """Type, bytes, base64 and id are those of llm."""
    stock = llm.Attachment(content=data)

    async def ask():
        attachment = AsyncAttachment(content=data)
        return [await m() for m in (attachment.content_bytes, attachment.base64_content,
                                    attachment.id)]  # fmt: skip

    assert asyncio.run(ask()) == [data, stock.base64_content(), stock.id()]


# -- nothing blocks -----------------------------------------------------------------------------


async def test_nothing_blocks(host, tmp_path):
    """Slow hosts and large files do not hold the loop; no thread is left that was not there."""
    large = tmp_path / "large.pdf"
    large.write_bytes(b"%PDF-1.7" + bytes(30_000_000))
    slow = [AsyncAttachment(url=host.add(f"{n}.png", PNG, delay=0.5)) for n in range(4)]
    await AsyncAttachment(path=str(large)).prepare()  # worker threads stay
    async with no_event_loop_blocking(action="raise", threshold=0.2):
        await asyncio.gather(
            *(a.content_bytes() for a in slow),
            AsyncAttachment(path=str(large)).prepare(),
            AsyncAttachment(path=str(large)).save(tmp_path / "copy.pdf"),
        )
