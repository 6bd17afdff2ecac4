"""Which attachment, where its bytes are, and what type they have."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection
from dataclasses import dataclass
from mimetypes import MimeTypes
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import llm
from llm.utils import mimetype_from_path, mimetype_from_string

from .errors import AttachmentFetchError, AttachmentTooLarge

HEAD_BYTES = 36_870  # as much as puremagic looks at
GENERIC_TYPES = ("application/octet-stream", "binary/octet-stream")

_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_TOKEN = r"[\w!#$%&'*+.^`|~-]+"  # RFC 9110, 5.6.2
_MEDIA_TYPE = re.compile(f"{_TOKEN}/{_TOKEN}", re.ASCII)

# The types known to Python; `mimetypes.guess_type()` would read files of the system, on the loop.
_extensions = MimeTypes()


@dataclass(frozen=True)
class Source:
    """Where an attachment's bytes are: its content, its path or its URL. Equal sources are one."""

    kind: str
    place: str | int

    @classmethod
    def of(cls, attachment: llm.Attachment) -> Source | None:
        """The source that llm itself would read, None where the attachment has none."""
        if attachment.content:
            return cls("content", id(attachment.content))
        if attachment.path:
            return cls("path", str(attachment.path))
        return cls("url", str(attachment.url)) if attachment.url else None


def describe(attachment: Any) -> str:
    """Which attachment, for people: without the secrets that a URL may carry."""
    if attachment.content:
        return f"content of {size_text(len(attachment.content))}"
    if attachment.path:
        return str(attachment.path)
    return public_url(str(attachment.url)) if attachment.url else "an empty attachment"


def public_url(url: str) -> str:
    """A URL without user, password, query and fragment: pre-signed ones carry their key there."""
    # Not with urlsplit(), which refuses what is malformed: that may have secrets too.
    scheme, slashes, rest = re.split("[?#]", url, maxsplit=1)[0].partition("//")
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    if slashes and not _HOST_AND_PORT.fullmatch(host):  # "user:secret/more@host", unescaped
        host, slash, path = "...", "", ""
    shown = scheme + slashes + host + slash + path
    shown = "".join(c if c.isprintable() else "\ufffd" for c in shown)
    shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
    return f"{shown}?..." if "?" in url else shown


def size_text(size: int) -> str:
    """A number of bytes, for people: `1.2 MB`."""
    if size < 1000:
        return f"{size} bytes"
    for unit, factor in (("kB", 1e3), ("MB", 1e6)):
        if size < factor * 1000:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e9:.3g} GB"


def too_large(shown: str, size: int, max_bytes: int, *, known: bool = True) -> AttachmentTooLarge:
    """The refusal of a body over the cap, with the ways out of llm issue 1143."""
    amount = size_text(size) if known else f"more than {size_text(max_bytes)}"
    return AttachmentTooLarge(
        f"{shown} is too large: {amount}, the cap is {size_text(max_bytes)}. Use a model that "
        "takes attachments by URL, raise the cap (setting max_bytes, or max_attachment_bytes of "
        "the model), or save it to a file with AsyncAttachment.save()",
        attachment=shown,
        size=size if known else None,
        max_bytes=max_bytes,
    )


# -- its type --------------------------------------------------------------------------------------


def type_from_header(value: str | None, declared: Collection[str] = ()) -> str | None:
    """The media type of a Content-Type header, None where it says nothing.

    Models compare types as exact strings: a header that the model declares as it stands is kept,
    any other loses its parameters.
    """
    if not value:
        return None
    if (value := value.strip()) in declared:
        return value
    essence = value.partition(";")[0].strip().lower()
    if essence in GENERIC_TYPES or not _MEDIA_TYPE.fullmatch(essence):
        return None
    return essence


def type_from_bytes(head: bytes) -> str | None:
    """The media type of a file that begins with these bytes, None where they do not tell."""
    media_type: Any = mimetype_from_string(head) if head else None
    return str(media_type) if media_type else None


def type_from_url(url: str) -> str | None:
    """The media type that the extension of a URL's path stands for."""
    try:
        path: str = urlsplit(url).path
        return _extensions.guess_type(path)[0]
    except ValueError:
        return None


# -- in a file -------------------------------------------------------------------------------------


def read_path(path: str) -> bytes:
    """The bytes of a local file; blocking. Raises AttachmentFetchError."""
    with file_errors(path):
        return Path(path).read_bytes()


def size_of_path(path: str) -> int:
    """The size of a local file; blocking. Raises AttachmentFetchError."""
    with file_errors(path):
        return Path(path).stat().st_size


def type_of_path(path: str) -> str | None:
    """The media type of a local file as llm finds it; blocking. Raises AttachmentFetchError."""
    with file_errors(path), Path(path).open("rb") as file:
        return mimetype_from_path(path) or None if file.read(1) else None


class file_errors:
    """Turns what is wrong with a path into an AttachmentFetchError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # puremagic raises ValueError for a file that it finds empty, and for embedded null bytes
        # Path does
        if isinstance(error, (OSError, ValueError)):
            code = error.errno if isinstance(error, OSError) else None
            advice = {
                errno.ENOENT: "there is no such file. Check path=",
                errno.EISDIR: "it is a directory. Give the path of a file",
                errno.EACCES: "it may not be read. Check its permissions",
            }.get(code or 0, f"{getattr(error, 'strerror', None) or error}. Check path=")
            raise AttachmentFetchError(
                f"Could not read {self._path}: {advice}", attachment=self._path
            ) from error
