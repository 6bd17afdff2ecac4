"""llm-mrchatterbox, converted: a sync-only model that runs its own weights in this process.

Opt-in: `pip install torch llm-mrchatterbox`. The checkpoint is a small random one in the plugin's
own format, so what the model says means nothing; that it says 256 tokens of it is certain.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import llm
import pytest

from llm_async_attachments import models
from llm_async_attachments.converted import ConvertedModel

OPT_IN = "opt-in: pip install torch llm-mrchatterbox"
torch = pytest.importorskip("torch", reason=OPT_IN)
llm_mrchatterbox = pytest.importorskip("llm_mrchatterbox", reason=OPT_IN)

pytestmark = pytest.mark.anyio

TOKENS = 256  # what the plugin asks of its engine
TOKEN_TIME = 0.05  # seconds per token where the model is to be slow: 13 seconds for all of them
SOON = 4  # seconds: far less than a slow model would go on for


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM_USER_PATH with random weights where the plugin looks for those it would download."""
    from llm_mrchatterbox.nanochat.checkpoint_manager import save_checkpoint
    from llm_mrchatterbox.nanochat.gpt import GPT, GPTConfig

    config = {"sequence_len": 1024, "vocab_size": 32768, "n_layer": 2, "n_embd": 32}
    config |= {"n_head": 2, "n_kv_head": 2, "window_pattern": "L"}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config))
    model.init_weights()
    with torch.no_grad():
        for block in model.transformer.h:  # zero at the start of a training
            block.attn.c_proj.weight.normal_(std=0.1)
            block.mlp.c_proj.weight.normal_(std=0.1)
        model.lm_head.weight.normal_()
        # <|endoftext|> is never among the 50 likeliest tokens: an answer does not end early.
        model.lm_head.weight[0] = 0
    torch.set_num_threads(1)  # several wait for each other, spinning, when the machine is busy
    user_path = tmp_path_factory.mktemp("llm")
    directory = user_path / "mrchatterbox"
    weights = model.state_dict()
    save_checkpoint(str(directory), llm_mrchatterbox.STEP, weights, None, {"model_config": config})
    return user_path


class Watch:
    """What the plugin did: how often it loaded weights, what it was asked, who made each token."""

    def __init__(self) -> None:
        self.loads = 0
        self.asked: list[list[int]] = []
        self.threads: list[threading.Thread] = []
        self.token_time = 0.0


@pytest.fixture(autouse=True)
def watch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    from llm_mrchatterbox.nanochat.engine import Engine
    from llm_mrchatterbox.nanochat.gpt import GPT, CausalSelfAttention

    watch = Watch()
    load, generate, forward = llm_mrchatterbox._load_model, Engine.generate, GPT.forward

    def counted_load():
        watch.loads += 1
        return load()

    def watched_generate(engine, tokens, **kwargs):
        watch.asked.append(list(tokens))
        return generate(engine, tokens, **kwargs)

    def watched_forward(*args, **kwargs):
        watch.threads.append(threading.current_thread())
        time.sleep(watch.token_time)
        return forward(*args, **kwargs)

    monkeypatch.setenv("LLM_USER_PATH", str(checkpoint))
    monkeypatch.setattr(models, "_registered", {})  # as in a new process: nothing loaded yet
    monkeypatch.setattr(llm_mrchatterbox, "_load_model", counted_load)
    monkeypatch.setattr(Engine, "generate", watched_generate)
    monkeypatch.setattr(GPT, "forward", watched_forward)
    # The plugin replaces this one at every load; here it is put back.
    monkeypatch.setattr(CausalSelfAttention, "__init__", CausalSelfAttention.__init__)
    return watch


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.01)


async def test_streams(watch: Watch):
    "The converted model delivers its first chunk while the model makes the rest, then all of them."
    model = llm.get_async_model("mrchatterbox")
    assert isinstance(model, ConvertedModel)
    assert type(model.sync_model) is llm_mrchatterbox.MrChatterbox
    await model.prompt("Good day").text()  # the weights are loaded

    watch.threads.clear()
    watch.token_time = 0.005
    response = model.prompt("Good day")
    chunks = []
    made_by_the_first = 0
    async for chunk in response:
        made_by_the_first = made_by_the_first or len(watch.threads)
        chunks.append(chunk)
    assert made_by_the_first < TOKENS / 2
    assert len(chunks) == TOKENS
    assert await response.text() == "".join(chunks)
    assert len(set(watch.threads)) == 1
    assert watch.threads[0] is not threading.main_thread()


async def test_second_turn(watch: Watch):
    "On the second turn the plugin hands its model the first prompt and answer, token for token."
    conversation = llm.get_async_model("mrchatterbox").conversation()
    first = await conversation.prompt("Who are you?").text()
    second = await conversation.prompt("And why?").text()
    assert first
    assert second

    encode = llm_mrchatterbox.VictorianTokenizer(llm_mrchatterbox.TOKENIZER_PATH).encode
    end, user, assistant = map(encode, ("<|endoftext|>", "<human>", "<victorian>"))
    who = encode(llm_mrchatterbox.SYSTEM_PREFIX + "Who are you?")
    opening = [*end, *user, *who, *end, *assistant]
    assert watch.asked[0] == opening
    assert watch.asked[1] == [
        *[*opening, *encode(first), *end],
        *[*user, *encode("And why?"), *end, *assistant],
    ]


async def wait_for(response: llm.AsyncResponse) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(response.text(), 0.5)


async def cancel(response: llm.AsyncResponse) -> None:
    task = asyncio.create_task(response.text())
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def break_off(response: llm.AsyncResponse) -> None:
    async for _ in response:
        break


@pytest.mark.parametrize("leave", [wait_for, cancel, break_off])
async def test_cancelled(watch: Watch, leave: Callable[[llm.AsyncResponse], object]):
    "Whoever leaves a prompt early is let go at once, its thread ends soon, and the next one runs."
    model = llm.get_async_model("mrchatterbox")
    await model.prompt("Good day").text()  # the weights are loaded

    watch.threads.clear()
    watch.token_time = TOKEN_TIME
    started = time.monotonic()
    await leave(model.prompt("Tell me everything"))
    assert time.monotonic() - started < SOON
    (thread,) = set(watch.threads)
    await until(lambda: not thread.is_alive())
    assert len(watch.threads) < TOKENS / 2

    watch.token_time = 0
    assert await model.prompt("Good day").text()
    assert watch.loads == 1


async def test_loaded_once(watch: Watch):
    "However often the model is looked up, before and after its first prompt, it loads once."
    looked_up = [llm.get_async_model("mrchatterbox") for _ in range(20)]
    await asyncio.gather(*(model.prompt("Good day").text() for model in looked_up[:2]))
    for _ in range(3):
        looked_up.append(llm.get_async_model("mrchatterbox"))
        await looked_up[-1].prompt("Good day").text()
    assert watch.loads == 1
    assert len(watch.asked) == 5


async def test_one_after_the_other(watch: Watch):
    "Of two prompts at once, the model makes all tokens of one before the first of the other."
    one, two = (llm.get_async_model("mrchatterbox") for _ in range(2))
    watch.token_time = 0.002
    texts = await asyncio.gather(one.prompt("Good day").text(), two.prompt("Good night").text())
    assert all(texts)
    runs = [len(list(run)) for _, run in itertools.groupby(watch.threads)]
    assert runs == [TOKENS + 1] * 2  # its prompt, and each token
