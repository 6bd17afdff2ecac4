"""The servers that the other tests and the demo stand on."""

import asyncio
import gzip
import ssl
import threading
import time
import zlib

import anyio
import httpx
import llm
import pytest
from llm.default_plugins import openai_models
from pyleak import no_thread_leaks

from llm_async_attachments.loopback import (
    FIXTURE_TYPES,
    Generated,
    MediaHost,
    ModelAPI,
    Reply,
    ToolCall,
    bomb,
    deflated,
    fixture,
    gzipped,
    self_signed,
)

PDF = fixture("document.pdf")


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def host():
    with MediaHost() as host:
        yield host


@pytest.fixture
def api():
    with ModelAPI() as api:
        yield api


@pytest.fixture
def client():
    with httpx.Client(trust_env=False, timeout=2) as client:
        yield client


def arrived(server, requests):
    while server.count() < requests:
        time.sleep(0.001)


# The media host


@pytest.mark.parametrize(("name", "type_"), FIXTURE_TYPES.items())
def test_fixtures_are_served_by_name(host, client, name, type_):
    "With a query it is another URL of the same file."
    for path in (name, name + "?n=2"):
        answer = client.get(host.url(path))
        assert type_ == answer.headers["content-type"]
        assert str(len(answer.content)) == answer.headers["content-length"]
        assert fixture(name) == answer.content
    assert client.get(host.url("no-such-file")).status_code == 404


def test_requests_are_recorded_with_their_connection(host, client):
    client.get(host.url("image.png"), headers={"X-Test": "1"})
    client.head(host.url("image.png?n=2"))
    httpx.get(host.url("image.gif"), trust_env=False)
    host.settle()
    first, second, third = host.requests
    assert (first.method, first.path, first.headers["x-test"]) == ("GET", "/image.png", "1")
    assert (len(fixture("image.png")), 0) == (first.sent, second.sent)
    assert [first.connection, second.connection, third.connection] == [1, 1, 2]
    assert first.complete
    assert (
        host.count(),
        host.count("GET"),
        host.count(path="/image.png"),
        host.count("HEAD", "/image.png?n=2"),
    ) == (3, 2, 2, 1)
    host.clear()
    assert host.count() == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"content-type": "application/pdf", "content-length": str(len(PDF))}),
        ({"type": None}, {"content-type": None}),
        ({"type": "image/png; charset=x"}, {"content-type": "image/png; charset=x"}),
        ({"framing": "chunked"}, {"content-length": None, "transfer-encoding": "chunked"}),
        ({"framing": "close"}, {"content-length": None, "transfer-encoding": None}),
        ({"pace": (500, 0.001)}, {"content-length": str(len(PDF))}),
        ({"stall_at": 100, "stall": 0.05}, {"content-length": str(len(PDF))}),
        ({"headers": {"ETag": "x"}}, {"etag": "x"}),
    ],
)
def test_headers_and_framing(host, client, options, expected):
    answer = client.get(host.add("/a.pdf", PDF, **options))
    assert expected == {name: answer.headers.get(name) for name in expected}
    assert answer.content == PDF


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"length": 10**6}, httpx.RemoteProtocolError),
        ({"close_at": "start"}, httpx.RemoteProtocolError),
        ({"close_at": 100}, httpx.RemoteProtocolError),
        ({"framing": "chunked", "close_at": 100}, httpx.RemoteProtocolError),
        ({"reset_at": "start"}, httpx.ReadError),
        ({"reset_at": 100}, httpx.ReadError),
        ({"stall_at": "start"}, httpx.ReadTimeout),
        ({"stall_at": 0}, httpx.ReadTimeout),
        ({"stall_at": 100}, httpx.ReadTimeout),
        ({"delay": 5}, httpx.ReadTimeout),
    ],
)
def test_broken_answers(host, client, options, error):
    "And the next request is answered as ever."
    url = host.add("/a.pdf", PDF, **options)
    with pytest.raises(error):
        client.get(url, timeout=0.2)
    assert client.get(host.url("document.pdf")).content == PDF
    assert host.errors == []


def test_a_body_longer_than_it_says(host, client):
    assert PDF[:10] == client.get(host.add("/a.pdf", PDF, length=10)).content


def test_refusals(host, client):
    url = host.add("/a.pdf", PDF, head=405, refuse_agent="python-httpx")
    assert client.head(url).status_code == 405
    assert client.get(url).status_code == 403
    assert client.get(url, headers={"User-Agent": "other"}).status_code == 200


def test_redirects(host, client):
    client.follow_redirects = True
    client.max_redirects = 5
    answer = client.get(host.redirect("/four", "/document.pdf", hops=4))
    assert (len(answer.history), answer.content) == (4, PDF)
    with pytest.raises(httpx.TooManyRedirects):
        client.get(host.redirect("/loop", "/loop"))
    with pytest.raises(httpx.UnsupportedProtocol):
        client.get(host.redirect("/file", "file:///etc/passwd"))
    moved = host.redirect("/large", host.url("image.png", "localhost"), content=Generated(10**8))
    first = client.get(moved, follow_redirects=True).history[0]
    assert str(10**8) == first.headers["content-length"]


def test_a_sequence_ends_with_its_last_answer(host, client):
    busy = Reply(status=503, headers={"Retry-After": "1"})
    url = host.sequence("/a.pdf", Reply(status=503), busy, PDF)
    assert [client.get(url).status_code for _ in range(4)] == [503, 503, 200, 200]


def test_encodings_and_bombs(host, client):
    for name, data in (("gzip", gzipped(PDF)), ("deflate", deflated(PDF))):
        answer = client.get(host.add("/a.pdf", data, headers={"Content-Encoding": name}))
        assert (PDF, len(data)) == (answer.content, host.requests[-1].sent)
    assert bytes(10**6) == gzip.decompress(bomb(10**6))
    assert bytes(10**6) == zlib.decompress(gzip.decompress(bomb(10**6, layers=2)), wbits=31)
    assert len(bomb(10**7)) < 20_000


def test_a_function_answers(host, client):
    "Plain or async; what goes wrong in it is a 500 and an entry in errors."

    async def later(request):
        await asyncio.sleep(0)
        return Reply(request.path.encode(), type="text/plain")

    def parts(request):
        return (part for part in (b"a", b"b"))

    assert client.get(host.add("/later", later) + "?q=1").text == "/later?q=1"
    assert client.get(host.add("/parts", parts)).text == "ab"
    assert client.get(host.add("/bad", lambda request: 1 / 0)).status_code == 500
    assert "ZeroDivisionError" in host.errors[0]


def test_an_unread_body_is_not_sent(host, client):
    url = host.add("/large.mp4", Generated(200_000_000, b"head"))
    with client.stream("GET", url) as answer:
        assert answer.headers["content-length"] == "200000000"
    host.settle()
    assert not host.requests[0].complete
    assert host.requests[0].sent < 10_000_000
    assert sum(map(len, client.get(url).iter_bytes())) == 200_000_000
    assert host.requests[1].sent == 200_000_000


@pytest.mark.anyio
async def test_many_connections_at_once_and_a_gate():
    "All 64 are held at the gate together, then answered."
    gate = threading.Event()
    limits = httpx.Limits(max_connections=64)
    with MediaHost() as host:
        url = host.add("/a.pdf", PDF, stall_at="start", stall=gate)
        async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=10) as client:
            bodies = []

            async def get(number):
                bodies.append((await client.get(f"{url}?n={number}")).content)

            async with anyio.create_task_group() as group:
                for number in range(64):
                    group.start_soon(get, number)
                await anyio.to_thread.run_sync(arrived, host, 64)
                gate.set()
        assert bodies == [PDF] * 64
        assert (host.most_at_once, host.connections) == (64, 64)


def test_a_caller_that_blocks_does_not_stop_the_server(host, client):
    "The server answers while this thread sits in a blocking call."

    async def main():
        return client.get(host.url("document.pdf")).content

    assert asyncio.run(main()) == PDF


@no_thread_leaks(action="raise", exclude_daemon=False)
def test_nothing_is_left_behind():
    "Neither by idle connections nor by an answer that stalls."
    with MediaHost() as host, httpx.Client(trust_env=False) as client:
        url = host.url("image.png")
        client.get(url)
        stalled = client.build_request("GET", host.add("/never", stall_at=0))
        client.send(stalled, stream=True)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    assert not host.requests[-1].complete


def test_tls_with_a_self_signed_certificate(tmp_path):
    pem = self_signed(tmp_path)
    context = ssl.create_default_context(cafile=pem)
    with MediaHost(tls=pem) as host:
        url = host.url("document.pdf")
        assert url.startswith("https://")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url, trust_env=False)
        assert httpx.get(url, trust_env=False, verify=context).content == PDF
        large = host.add("/large", Generated(5_000_000), close_at=4_000_000)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            httpx.get(large, trust_env=False, verify=context)


# The model API


@pytest.fixture
def user_path(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


DIALECTS = [
    {},
    pytest.param(
        {"responses": True},
        marks=pytest.mark.skipif(
            not hasattr(openai_models, "AsyncResponses"), reason="this llm has chat only"
        ),
    ),
]


def weather(city: str) -> str:
    "The weather in a city."
    return f"rain in {city}"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("keys", DIALECTS)
def test_stock_models_of_llm_talk_to_it(api, user_path, keys, stream):
    "Text, usage, attachments and a tool call, with llm's own sync and async models."
    api.write_models(user_path, "fake", **keys)
    model = llm.get_model("fake")
    assert {"application/pdf", "image/png", "audio/wav"} <= model.attachment_types
    attachment = llm.Attachment(type="application/pdf", content=PDF)
    api.enqueue("Hello ", "world")
    response = model.prompt("hi", attachments=[attachment], stream=stream)
    assert response.text() == "Hello world"
    assert (response.usage().input, response.usage().output) == (10, 2)
    assert "application/pdf;base64" in str(api.requests[0].json())

    async def main():
        api.enqueue(ToolCall("weather", {"city": "Rome"}))
        api.enqueue("It is ", "wet.")
        chain = api.async_model(**keys).chain("?", tools=[weather], stream=stream)
        return await chain.text()

    assert asyncio.run(main()) == "It is wet."
    assert "rain in Rome" in str(api.requests[-1].json())
    assert model.prompt("again", stream=stream).text() == "ok"
    assert api.errors == []


def test_answers_that_fail_or_come_slowly(api, user_path):
    api.write_models(user_path, "fake")
    model = llm.get_model("fake")
    api.enqueue(status=400)
    with pytest.raises(Exception, match="programmed to fail"):
        model.prompt("hi").text()
    api.enqueue(status=429, headers={"Retry-After": "0.01"})
    api.enqueue("a", "b", every=0.1)
    began = time.perf_counter()
    assert list(model.prompt("hi")) == ["a", "b"]
    assert time.perf_counter() - began > 0.2
    assert [request.status for request in api.requests] == [400, 429, 200]


@pytest.mark.anyio
async def test_answer_with_sees_the_request(user_path):
    with ModelAPI(answer_with=lambda request: [request.json()["messages"][0]["content"]]) as api:
        assert await api.async_model().prompt("echo").text() == "echo"
