"""Fetch or pass through: what the model says, then what was seen of it, then what is known.

A prediction, never a risk: what was passed through and is asked for after all is fetched then.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary


class Known(NamedTuple):
    """What a released plugin hands over as a URL. `sure`: relied on even where nothing can wait."""

    patterns: tuple[str, ...]
    sure: bool = False


# By class, for it and its subclasses. A row that is out of date costs a late fetch.
KNOWN = {
    "llm.default_plugins.openai_models._Shared": Known(("image/*",), sure=True),
    "llm_gemini._SharedGemini": Known(("video/youtube",), sure=True),
    "llm_anthropic._Shared": Known(("image/*", "application/pdf")),
    "llm_mistral._Shared": Known(("image/*", "audio/*")),
    "llm_github_models._Shared": Known(("image/*",)),
    "llm_groq.LLMGroqWhisper": Known(("audio/*", "video/*", "application/ogg")),
}


class Choice(NamedTuple):
    """Whether a media type is passed through, and why: declared, seen, known or default."""

    passes: bool
    reason: str


class _Seen:
    """What was seen of model classes: which media types they took by URL. Thread-safe."""

    def __init__(self) -> None:
        self._asked: WeakKeyDictionary[type, dict[str, bool]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, model_class: type, media_type: str) -> bool | None:
        """True: asked for its bytes, once at least; False: given them and never asked."""
        return self._asked.get(model_class, {}).get(media_type)

    def note(self, model_class: type, media_type: str, *, asked: bool) -> None:
        """Having asked outweighs not having asked, whichever came first."""
        with self._lock:
            types = self._asked.setdefault(model_class, {})
            types[media_type] = asked or types.get(media_type, False)

    def clear(self) -> None:
        with self._lock:
            self._asked.clear()


seen = _Seen()


def class_of(model: Any) -> type:
    """The class that a plugin author wrote: of a converted model, that of its sync model."""
    return type(getattr(model, "sync_model", None) or model)


def choose(model: Any, media_type: str | None, *, can_wait: bool) -> Choice:
    """Pass a media type through, or fetch it.

    `can_wait` says that a wrong guess can still be met; if not, only declarations and sure
    knowledge count.
    """
    declared = getattr(model, "supports_attachment_urls", None)
    if declared is not None:
        if isinstance(declared, bool) or matches(declared, media_type):
            return Choice(bool(declared), "declared")
        if not can_wait:
            return Choice(False, "default")
    if media_type is None:
        return Choice(False, "default")
    if can_wait and (asked := seen.get(class_of(model), media_type)) is not None:
        return Choice(not asked, "seen")
    for known in known_of(model):
        if (known.sure or can_wait) and matches(known.patterns, media_type):
            return Choice(True, "known")
    return Choice(False, "default")


def known_of(model: Any) -> Iterator[Known]:
    """The rows of the table that a model's class and its bases have."""
    for base in class_of(model).__mro__:
        if row := KNOWN.get(f"{base.__module__}.{base.__qualname__}"):
            yield row


def matches(patterns: Collection[str] | str, media_type: str | None) -> bool:
    """True if one of the patterns, such as `image/*`, matches a media type without parameters."""
    if media_type is None:
        return False
    essence = media_type.partition(";")[0].strip().lower()
    several = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(essence, pattern.lower()) for pattern in several)
