"""The rating sheet over HTTP on loopback: one page out, ratings in, nothing else.

Other users of a cluster's login node share its loopback, so every request must carry the token of the printed
address. The key and the answers of other raters have no address here.
"""

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf.errors import UserError
from rlhf.ratings.collect import MAX_BYTES, check_sheet, store_sheet

_TIMEOUT = 30  # seconds that a client may keep a connection waiting
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SheetServer(ThreadingHTTPServer):
    """Serves `page` at /?token=TOKEN and stores what is posted to /ratings?token=TOKEN in `folder`.

    `url` is the address for the rater. Port 0 takes a free one. A port in use is a UserError.
    """

    daemon_threads = True

    def __init__(self, page: str, key: dict[str, Any], folder: Path, port: int = 0) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"port: expected a free one, found {port}: {error.strerror}") from error
        self.page, self.key, self.folder = page.encode(), key, folder
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: SheetServer
    timeout = _TIMEOUT
    server_version, sys_version = "rating", ""

    def do_GET(self) -> None:
        if self._allowed("/"):
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if not self._allowed("/ratings"):
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or not 0 < int(length) <= MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected 1 to {MAX_BYTES:,} bytes")
            return
        try:
            record = json.loads(self.rfile.read(int(length)))
            if not isinstance(record, dict):
                raise UserError(f"expected a JSON object, found {type(record).__name__}")
            sheet = check_sheet(self.server.key, record, "sheet")
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (ValueError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "expected JSON")
        else:
            store_sheet(self.server.folder, sheet)
            state = "complete" if sheet["complete"] else "incomplete"
            print(f"received: sheet of {sheet['rater']!r}, {state}", flush=True)
            self._answer(HTTPStatus.OK, b"received", "text/plain; charset=utf-8")

    def _allowed(self, path: str) -> bool:
        """Token, path and Host must be ours; a foreign Host is a page that had its name point to loopback."""
        address = urlsplit(self.path)
        token = parse_qs(address.query).get("token", [""])[0]
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        known = hmac.compare_digest(token.encode(), self.server.token.encode())
        if not known or host not in ("127.0.0.1", "localhost"):
            self._refuse(HTTPStatus.FORBIDDEN, "expected the address that rate.py printed, token included")
        elif address.path != path:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here")
        else:
            return True
        return False

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # a body that was not read must not be taken for the next request
        self._answer(status, text.encode("utf-8", "replace"), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests carry the token: they are not logged."""
