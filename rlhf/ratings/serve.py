"""The rating sheet over HTTP on loopback: one page out, ratings in, nothing else.

Other users of a cluster's login node share its loopback, so every request must carry the token of the printed
address. The key and the answers of other raters have no address here.
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

_TIMEOUT = 30  # seconds that a client may keep a connection waiting
_LIFETIME = 120  # seconds that a connection may last, however busy: a sheet may come through a slow tunnel
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
            raise UserError(f"port: expected a free one, found {port}: {error.strerror}") from error
        self.page, self.key, self.folder = page.encode(), key, folder
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_port}/?token={self.token}"
        self._free = threading.BoundedSemaphore(self.connections)
        self._storing = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread a connection, of a limited number: those that come beyond it are closed."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Cuts a connection that lasts too long: a byte now and then would keep each single wait short."""
        watch = threading.Timer(self.lifetime, _cut, (request,))
        watch.daemon = True
        watch.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            watch.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line, and none for a client that went away; a traceback would show what was asked for."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"error: request: {type(error).__name__}", file=sys.stderr, flush=True)

    def store(self, sheet: Sheet) -> None:
        """Store a checked sheet; a UserError where that fails, or another rater has handed in one by the same name."""
        with self._storing:
            check_rater(sheet, self._raters, "sheet")
            try:
                store_sheet(self.folder, sheet)
            except UserError as error:  # names the folder, which is none of the rater's business
                print(f"error: {error}", file=sys.stderr)
                raise UserError("sheet: expected to store it, found that the run's folder does not take it") from error
            self._raters[sheet["rater_id"]] = sheet["rater"]


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed already
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
        # A body in chunks has no size; two sizes are a request that hides another.
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
        """Token, path and Host must be ours; a foreign Host is a page that had its name point to loopback."""
        try:
            address = urlsplit(self.path)
        except ValueError:  # brackets that are no address
            self._refuse(HTTPStatus.BAD_REQUEST, "expected an address")
            return False
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

    def _own_page(self) -> bool:
        """Whether what is posted comes from the page itself, as far as the browser says where it comes from."""
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        if origin in (None, f"http://{self.headers['Host']}") and site in (None, "same-origin"):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "expected ratings from the rating page, found another one's")
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
