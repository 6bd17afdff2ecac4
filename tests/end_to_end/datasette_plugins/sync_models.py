"""For `datasette --plugins-dir`: sync-only llm models, registered anew at every lookup."""

import sys
import threading
import time
from typing import Any

import llm
from llm.plugins import pm


class Local(llm.Model):
    """Runs in this process: loads weights once, keeps the interpreter busy, streams."""

    model_id = "local"
    can_stream = True
    attachment_types = ("image/png",)
    loads = running = most = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.weights: Any = None

    def execute(self, prompt, stream, response, conversation=None):
        with self._lock:
            Local.running += 1
            Local.most = max(Local.most, Local.running)
        try:
            if self.weights is None:
                self.weights = object()
                Local.loads += 1
            yield f"{prompt.prompt}:"
            for attachment in prompt.attachments:
                yield f" {attachment.resolve_type()} {len(attachment.content_bytes())}"
            until = time.monotonic() + 0.02
            while time.monotonic() < until:
                yield "."
            yield f" loads {Local.loads} most {Local.most}"
        finally:
            with self._lock:
                Local.running -= 1


class WithOptions(llm.Model):
    """Reads an option of its own."""

    model_id = "with-options"

    class Options(llm.Options):
        times: int = 1

    def execute(self, prompt, stream, response, conversation=None):
        return [prompt.prompt] * prompt.options.times


class Failing(llm.Model):
    """Fails midway where the prompt says so."""

    model_id = "failing"
    can_stream = True

    def execute(self, prompt, stream, response, conversation=None):
        yield "half of "
        if "error" in prompt.prompt:
            raise ValueError(f"cannot do {prompt.prompt}")
        if "exit" in prompt.prompt:
            sys.exit(f"leaving at {prompt.prompt}")
        yield prompt.prompt


class Slow(llm.KeyModel):
    """Waits, as for a network."""

    model_id = "slow"

    def execute(self, prompt, stream, response, conversation=None, key=None):
        time.sleep(0.1)
        yield prompt.prompt


class Models:
    @llm.hookimpl
    def register_models(self, register):
        for model in (Local(), WithOptions(), Failing(), Slow()):
            register(model)


pm.register(Models(), name="sync-models-for-datasette")
