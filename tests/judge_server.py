"""An OpenAI-compatible endpoint on 127.0.0.1: real HTTP, and a judge of several moods."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-canaryCANARYcanary"


class Endpoint(ThreadingHTTPServer):
    """Says which answer is better, in its `mood`.

    `content`: the one that says "good". `first`: always A. `words`: whatever `reply` is. Others fail.

    Attributes:
        asked: what was posted. keys: the Authorization headers. paths: of the requests.
        failures: how many are left. then: called at each request.
    """

    daemon_threads = True

    def __init__(self, mood: str = "content", reply: str = "", failures: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.mood, self.reply, self.failures = mood, reply, failures
        self.then: Callable[[], object] = list
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody who did not wait for the answer."""


class Requests(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(asked)
        server.keys.append(self.headers["Authorization"])
        server.paths.append(self.path)
        server.then()
        if server.mood == "hangs":
            time.sleep(2)
        if server.mood == "picky" and "temperature" in asked:
            return self.answer(400, self.error("Unsupported value", param="temperature"))
        if server.mood == "busy" and server.failures:
            server.failures -= 1
            return self.answer(429, self.error("slow down"), {"Retry-After": "0.2"})
        if server.mood.isdigit():
            said = self.error(f"{server.mood}: key {KEY} may not")
            return self.answer(int(server.mood), said, {"Location": "/elsewhere"})
        if server.mood == "page":
            return self.answer(200, "<html>", kind="text/html")
        said = {"role": "assistant", "content": self.verdict(asked["messages"][0]["content"])}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        return self.answer(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

    def verdict(self, prompt: str) -> str:
        if self.server.mood == "first":
            return "A"
        if self.server.mood == "words":
            return self.server.reply
        good = ["good" in prompt.split(f"<answer_{x}>")[1].split("</")[0] for x in "AB"]
        return "tie" if good[0] == good[1] else "A" if good[0] else "B"

    @staticmethod
    def error(message: str, **more: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "error"} | more}

    def answer(
        self, status: int, body: Any, headers: dict[str, str] | None = None, kind: str = ""
    ) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind or "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
