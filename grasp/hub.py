"""The errors of the Hugging Face hub's client."""

from __future__ import annotations

from http.client import responses

from huggingface_hub.errors import HfHubHTTPError

from grasp.formatting import one_line

# The client passes on the errors of its HTTP library, which differs between versions.
HUB_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
# The client raises these where something else than a hub answers.
BAD_ANSWERS: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def hub_status(error: BaseException) -> str | None:
    """The HTTP status behind an error, to be shown in place of its text: a server's text may repeat the token."""
    chain: BaseException | None = error
    while chain is not None:
        if (status := getattr(getattr(chain, "response", None), "status_code", None)) is not None:
            return f"HTTP {status} {responses.get(status, '')}".rstrip()
        chain = chain.__cause__ or chain.__context__
    return None


def reason(error: BaseException) -> str:
    """What a library's error says, in one line: the HTTP status behind it, or its text if there is none."""
    return hub_status(error) or one_line(error)
