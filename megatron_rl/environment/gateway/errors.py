"""What an agent is told when its request cannot be answered."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that gets an error of HTTP `status`; the message says what to change. code: OpenAI's name of it."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.code = status, code
