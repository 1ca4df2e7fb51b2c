"""How long the hub is waited for: as it asks with 429 and Retry-After, up to a limit, and between tries."""

import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any

from stages.lib.run import preemption
from stages.lib.run.exits import TryAgain
from stages.lib.run.progress import say

LIMIT = 300.0  # seconds, together: the hub counts requests in windows of five minutes
PAUSES = (1.0, 2.0)  # seconds between the tries, of which there is one more


def pause(seconds: float) -> None:
    """Sleep, in any thread, until the time is over or a stop is asked for."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        preemption.check()
        time.sleep(min(left, 0.2))
    preemption.check()


def network_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library raises where a connection cannot be made, or is cut."""
    from huggingface_hub.errors import HfHubHTTPError

    library = __import__(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    return (library.TransportError,)


class Patience:
    """One stage's: `use` puts it into every request to the hub."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._lock = threading.Lock()

    def use(self) -> None:
        """Have the hub's client wait as the hub asks, where a signal can end it."""
        from huggingface_hub.utils import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        def client() -> Any:
            made = default_client_factory()
            hooks = made.event_hooks
            made.event_hooks = {
                "request": [*hooks["request"], _prepare],
                "response": [*hooks["response"], self._hear],
            }
            return made

        set_client_factory(client)

    def _hear(self, response: Any) -> None:
        seconds = asked_for(response.status_code, response.headers)
        if seconds is None:
            return
        with self._lock:  # one at a time: what one has waited for, the next need not
            if self.waited + seconds > LIMIT:
                raise TryAgain(
                    f"the hub asks to wait {seconds:.0f} s ({response.status_code}); run the same command then"
                )
            say(f"the hub asks to wait {seconds:.0f} s")
            self.waited += seconds
        pause(seconds)
        for name in ("retry-after", "ratelimit"):  # its library would wait for them again
            if name in response.headers:
                del response.headers[name]


def _prepare(request: Any) -> None:
    """Have no question to the hub wait for ever, which some would."""
    from huggingface_hub import constants

    preemption.check()
    if request.method in ("GET", "HEAD"):
        limits = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {
            kind: limits.get(kind) or constants.HF_HUB_DOWNLOAD_TIMEOUT for kind in kinds
        }


def asked_for(status: int, headers: Any) -> float | None:
    """The seconds that a response asks to wait, or None where it does not."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if status not in (429, 503):
        return None
    said = headers.get("retry-after", "")
    if said.strip().isdigit():
        return float(said)
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        pass
    known = parse_ratelimit_headers(headers)
    return (
        float(known.reset_in_seconds) if status == 429 and known and not known.remaining else None
    )
