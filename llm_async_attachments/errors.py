"""What can go wrong with an attachment.

    llm.ModelError
      AttachmentError             an attachment cannot be used
        AttachmentFetchError      its bytes could not be brought from its URL or path
        AttachmentTooLarge        it is larger than the cap
        BlockingFetchError        fetching it here would block the event loop

None of them is an OSError, a ValueError or an error of an HTTP library: plugins catch those around
an attachment and would send the prompt without it.
"""

from __future__ import annotations

import llm


class AttachmentError(llm.ModelError):
    """An attachment cannot be used. `attachment` says which, without secrets of its URL."""

    def __init__(self, message: str, *, attachment: str | None = None) -> None:
        super().__init__(message)
        self.attachment = attachment


class AttachmentFetchError(AttachmentError):
    """The bytes of an attachment could not be brought from its URL or path.

    `status` is the HTTP status when a server answered with one that is not a success.
    """

    def __init__(
        self, message: str, *, attachment: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message, attachment=attachment)
        self.status = status


class AttachmentTooLarge(AttachmentError):
    """An attachment is larger than the cap: `size` (as far as known) over `max_bytes`, in bytes."""

    def __init__(
        self,
        message: str,
        *,
        attachment: str | None = None,
        size: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(message, attachment=attachment)
        self.size = size
        self.max_bytes = max_bytes


class BlockingFetchError(AttachmentError):
    """An attachment was asked for bytes or a type that only a blocking fetch could give here."""
