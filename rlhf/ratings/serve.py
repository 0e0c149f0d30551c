"""The rating sheet over HTTP on loopback: it serves one page and accepts ratings, nothing else.

Other users of a cluster's login node share its loopback, so every request needs the token from the printed address.
The key and the answers of other raters are not served.
"""

import contextlib
import hmac
import json
import re
import secrets
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf.errors import UserError
from rlhf.file_types import RatingKey, Sheet
from rlhf.ratings.collect import MAX_BYTES, check_rater, check_sheet, store_sheet, stored_sheets

_TIMEOUT = 30  # seconds to wait for a client
_LIFETIME = 120  # seconds that a connection may last: long enough for a slow tunnel
_CONNECTIONS = 32  # at once; a rater's browser opens one or two
_SIZE = re.compile(r"[0-9]{1,9}")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SheetServer(ThreadingHTTPServer):
    """Serves `page` at /?token=TOKEN and stores what is posted to /ratings?token=TOKEN in `folder`.

    `url` is the address for the rater. Port 0 takes a free one. A port in use is a UserError.
    """

    daemon_threads = True
    lifetime, connections = float(_LIFETIME), _CONNECTIONS

    def __init__(self, page: str, key: RatingKey, folder: Path, port: int = 0) -> None:
        self._raters = {sheet["rater_id"]: sheet["rater"] for sheet in stored_sheets(key, folder)}
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"port: {port} cannot be used ({error.strerror}); choose another") from error
        self.page, self.key, self.folder = page.encode(), key, folder
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_port}/?token={self.token}"
        self._free = threading.BoundedSemaphore(self.connections)
        self._storing = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Use one thread per connection; close connections beyond the limit."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Close a connection that lasts too long: a byte now and then would never hit the timeout."""
        watch = threading.Timer(self.lifetime, _shut_down, (request,))
        watch.daemon = True
        watch.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            watch.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print one line, none for a client that disconnected. A traceback would show the request, token included."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"error: request: {type(error).__name__}", file=sys.stderr, flush=True)

    def store(self, sheet: Sheet) -> None:
        """Store a checked sheet; a UserError if that fails, or if another rater has the same name."""
        with self._storing:
            check_rater(sheet, self._raters, "sheet")
            try:
                store_sheet(self.folder, sheet)
            except UserError as error:  # it names the folder, which the rater must not see
                print(f"error: {error}", file=sys.stderr)
                raise UserError("sheet: it could not be stored; save it as a file instead") from error
            self._raters[sheet["rater_id"]] = sheet["rater"]


def _shut_down(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: SheetServer
    timeout = _TIMEOUT
    server_version, sys_version = "rating", ""

    def do_GET(self) -> None:
        if self._allowed("/"):
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if not self._allowed("/ratings") or not self._own_page():
            return
        # A chunked body has no size. Two sizes may hide a second request.
        lengths = self.headers.get_all("Content-Length", []) + self.headers.get_all("Transfer-Encoding", [])
        length = lengths[0] if len(lengths) == 1 else ""
        if not _SIZE.fullmatch(length) or not 0 < int(length) <= MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected 1 to {MAX_BYTES:,} bytes")
            return
        try:
            record = json.loads(self.rfile.read(int(length)))
            if not isinstance(record, dict):
                raise UserError(f"expected a JSON object, found {type(record).__name__}")
            sheet = check_sheet(self.server.key, record, "sheet")
            self.server.store(sheet)
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (ValueError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "expected JSON")
        else:
            state = "complete" if sheet["complete"] else "incomplete"
            print(f"received: sheet of {sheet['rater']!r}, {state}", flush=True)
            self._answer(HTTPStatus.OK, b"received", "text/plain; charset=utf-8")

    def _allowed(self, path: str) -> bool:
        """Check token, path and Host; a foreign Host means DNS rebinding."""
        try:
            address = urlsplit(self.path)
        except ValueError:  # malformed brackets
            self._refuse(HTTPStatus.BAD_REQUEST, "expected a valid address")
            return False
        token = parse_qs(address.query).get("token", [""])[0]
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        known = hmac.compare_digest(token.encode(), self.server.token.encode())
        if not known or host not in ("127.0.0.1", "localhost"):
            self._refuse(HTTPStatus.FORBIDDEN, "use the address that the command printed, with its token")
        elif address.path != path:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here")
        else:
            return True
        return False

    def _own_page(self) -> bool:
        """Whether the request comes from this page, as far as the browser says."""
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        if origin in (None, f"http://{self.headers['Host']}") and site in (None, "same-origin"):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "expected a request from the rating page, found one from another page")
        return False

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # an unread body must not be parsed as the next request
        self._answer(status, text.encode("utf-8", "replace"), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: requests carry the token."""
