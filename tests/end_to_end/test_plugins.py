"""What attachments by URL cost with published plugins: tests/benchmarks/plugins.py, asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import llm
import pytest

from llm_async_attachments import bridge, to_async
from llm_async_attachments.loopback import MediaHost, ModelAPI, Reply, fixture

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "plugins.py"
MODULES = {
    "openai chat": "llm.default_plugins.openai_models",
    "openai responses": "llm.default_plugins.openai_models",
    "anthropic": "llm_anthropic",
    "gemini": "llm_gemini",
    "mistral": "llm_mistral",
    "ollama": "llm_ollama",
    "groq": "llm_groq",
    "github-models": "llm_github_models",
}
PUBLISHED = [module for name, module in MODULES.items() if not name.startswith("openai")]
DELAY = 0.3

pytestmark = pytest.mark.skipif(
    not bridge.available(), reason="without greenlet the table of known plugins is not relied on"
)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module", params=MODULES)
def report(request):
    """What the benchmark says of one plugin: its rows, its goals."""
    module = MODULES[request.param]
    if not installed(module):
        pytest.skip(f"{module} is not installed")
    if not any(map(installed, PUBLISHED)):
        pytest.skip("takes minutes: install the extra `plugins` (test_openai.py has its tests)")
    options = ["--json", "--delay", str(DELAY), "--pause", "0.2", "--only", request.param]
    run = subprocess.run(
        [sys.executable, BENCHMARK, *options], capture_output=True, text=True, timeout=180
    )
    assert run.stdout.startswith("{"), run.stderr
    return json.loads(run.stdout)


def missed(report, goal):
    return [g["missed"] for g in report["goals"] if g["goal"].startswith(goal)]


def test_stock_llm_blocks_where_ours_does_not(report):
    """Of the media host's delay the loop sees nothing; with stock llm it stands still for it."""
    for row in report["rows"]:
        assert row["ours"]["stall_ms"] < 1000 * DELAY / 2
        if row["stock"]["requests"]:
            assert row["stock"]["stall_ms"] > 1000 * DELAY / 2


def test_every_prompt_is_answered(report):
    """Stock llm and ours get the answer of the API."""
    assert missed(report, "every prompt") == [[]]


def test_an_attachment_costs_one_request(report):
    """One, and none where the type is given and the URL is passed through."""
    assert missed(report, "one request") == [[]]


def test_no_byte_is_wasted(report):
    """Of known plugins from the first prompt on, of others from the second."""
    assert missed(report, "0 wasted bytes") == [[], []]


def test_the_request_body_is_the_same(report):
    """The API gets, byte for byte, what it gets from stock llm."""
    assert missed(report, "the same request body") == [[], []]


def test_the_table_of_known_plugins_is_right(report):
    """What is predicted of a plugin that nothing was seen of is what stock llm does with it."""
    assert missed(report, "the table of known plugins") == [[]]


def test_count_tokens_is_right_every_time(report):
    """The option that changes llm-anthropic's mind counts the bytes, whatever was learned."""
    if "anthropic" not in {row["plugin"] for row in report["rows"]}:
        pytest.skip("an option of llm-anthropic")
    assert missed(report, "count_tokens") == [[]]


# -- sync-only: there is no stock async form to compare with --------------------------------------


class Transcriber(ModelAPI):
    """Groq's API for transcriptions."""

    def answer(self, request):
        return Reply(b"hello", type="text/plain")


@pytest.mark.anyio
@pytest.mark.skipif(not installed("llm_groq"), reason="llm_groq is not installed")
@pytest.mark.parametrize("media_type", ["audio/mpeg", None])
async def test_groq_whisper_gets_the_url(monkeypatch, media_type):
    """The converted model hands the URL over, from the first prompt on, and no body is read."""
    import llm_groq

    with MediaHost() as host, Transcriber() as api:
        monkeypatch.setenv("GROQ_BASE_URL", api.url().rstrip("/"))
        sound = fixture("sound.mp3").ljust(300_000, b"\0")
        url = host.add("/sound.mp3", sound, stall_at=0, stall=0.05)
        model = to_async(llm_groq.LLMGroqWhisper("groq/whisper", "whisper"))
        model.key = "loopback"
        attachment = llm.Attachment(url=url, type=media_type)
        assert await model.prompt("", attachments=[attachment]).text() == "hello"
        host.settle()
        assert url.encode() in api.requests[0].body
        assert [request.sent for request in host.requests] == ([] if media_type else [0])
