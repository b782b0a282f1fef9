"""Tells a web address what becomes of a run. A run never waits for it: a thread sends, and gives up after a while."""

import json
import logging
import queue
import threading
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.request import Request, urlopen

from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt, wait_exponential

from data.storage.redaction import redact_values
from trainer.config.sections import shown_address

log = logging.getLogger(__name__)

Event = Literal["started", "restarted", "stopped", "diverged", "failed", "finished"]
ATTEMPTS = 4
TIMEOUT_S = 5.0
CLOSE_S = 15.0


class Notifier:
    """Posts a small JSON for each event of a run: event, run, time, what is known of it, and a line of text."""

    def __init__(self, address: str | None, run: str | Path, *, close_s: float = CLOSE_S) -> None:
        """Start to send, if there is an address.

        Args:
            address: where to post, http or https; never shown, as its path is often a secret.
            run: directory of the run, whose last part names it.
            close_s: how long `close` waits for what is left to send.
        """
        self._address, self._run, self._close_s = address, Path(run).name, close_s
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._gave_up = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="notifier", daemon=True)
        if address:
            self._thread.start()

    def tell(self, event: Event, **facts: str | int) -> None:
        """Send an event, later.

        Args:
            event: what happened.
            facts: such as step, images and reason; secrets in texts are left out.
        """
        facts = redact_values(facts)
        said = ", ".join(f"{name} {value}" for name, value in facts.items())
        text = f"{self._run} {event}" + (f": {said}" if said else "")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._waiting.put({"event": event, "run": self._run, "time": now, **facts, "text": text})

    def close(self) -> None:
        """Wait, but not for long, until what is left has been sent; what then is left is given up."""
        self._waiting.put(None)
        if not self._address:
            return
        self._thread.join(self._close_s)
        self._gave_up.set()
        if self._thread.is_alive():
            log.warning("%s does not answer: what it was not told is given up", shown_address(self._address))

    def _send_all(self) -> None:
        while (content := self._waiting.get()) is not None and not self._gave_up.is_set():
            try:
                self._send(json.dumps(content).encode())
            except Exception as error:  # the address may answer anything; training goes on
                if self._gave_up.is_set():
                    return
                reason = str(error).replace(self._address or "", "the address")
                log.warning(
                    "%s was not told that the run %s: %s", shown_address(self._address), content["event"], reason
                )

    def _send(self, body: bytes) -> None:
        assert self._address
        request = Request(self._address, body, {"Content-Type": "application/json"})
        for attempt in Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=0.5),
            sleep=sleep_using_event(self._gave_up),
            retry=retry_if_exception_type((OSError, HTTPException)),
            reraise=True,
        ):
            with attempt, urlopen(request, timeout=TIMEOUT_S):
                pass
