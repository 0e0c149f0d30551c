"""The rating server against those who share its machine, or a page in the rater's own browser."""

import json
import socket
import threading
import time

import pytest
import rating_sheets
from rating_sheets import serving

from rlhf.errors import UserError
from rlhf.ratings.collect import MAX_RATERS, check_rater, stored_sheets

KEY = rating_sheets.key()


@pytest.fixture
def server(tmp_path, capfd):
    with serving(tmp_path / "ratings") as server:
        yield server
    assert "Traceback" not in capfd.readouterr().err


def talk(server, request, timeout=10.0):
    """Send bytes as they are, and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout) as connection:
        connection.sendall(request)
        return read(connection)


def read(connection):
    answer = b""
    try:
        while part := connection.recv(65536):
            answer += part
    except ConnectionResetError:  # closed with what we sent still unread
        pass
    return answer


def head(server, *lines, path="/ratings", method="POST", host="127.0.0.1"):
    start = [f"{method} {path}?token={server.token} HTTP/1.1", f"Host: {host}", *lines]
    return ("\r\n".join(start) + "\r\n\r\n").encode("latin-1")


def post(server, record, *lines):
    body = json.dumps(record).encode()
    return talk(server, head(server, f"Content-Length: {len(body)}", *lines) + body)


def status(answer):
    return int(answer.split()[1])


def test_a_page_elsewhere_cannot_post_even_with_the_token(server):
    sheet = rating_sheets.filled(KEY, "Ann")
    for line in (
        *("Origin: http://evil.example", "Origin: null", "Origin: https://127.0.0.1", "Origin: http://127.0.0.1:1"),
        *("Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Sec-Fetch-Site: none"),
    ):
        answer = post(server, sheet, line)
        assert (status(answer), b"found one from another page" in answer) == (403, True), line
    assert stored_sheets(KEY, server.folder) == []
    assert status(post(server, sheet, "Origin: http://127.0.0.1", "Sec-Fetch-Site: same-origin")) == 200


def test_the_pages_own_origin_behind_a_tunnel_is_ours(server):
    body = json.dumps(rating_sheets.filled(KEY, "Ann")).encode()
    lines = (f"Content-Length: {len(body)}", "Origin: http://localhost:9", "Sec-Fetch-Site: same-origin")
    assert status(talk(server, head(server, *lines, host="localhost:9") + body)) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::1]", ""])
def test_a_name_that_was_pointed_to_loopback_is_refused(server, host):
    for method, path in (("GET", "/"), ("POST", "/ratings")):
        assert status(talk(server, head(server, method=method, path=path, host=host))) == 403


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: chunked",),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 50"),
        ("Content-Length: +5",),
        ("Content-Length: 5, 5",),
        ("Content-Length: \xb2",),  # isdigit, and no number
        ("Content-Length: " + "9" * 5000,),
        ("Content-Length: 0x5",),
    ],
)
def test_a_body_of_unclear_size_is_refused_and_the_connection_closed(server, lines):
    """What follows would otherwise be taken for another request."""
    hidden = head(server, method="GET", path="/")
    answer = talk(server, head(server, *lines, "Connection: keep-alive") + b"0\r\n\r\n" + hidden)
    assert status(answer) == 413
    assert answer.count(b"HTTP/1.") == 1


def test_one_request_a_connection(server):
    page = head(server, "Connection: keep-alive", method="GET", path="/")
    assert talk(server, page * 3).count(b"<title>Rating sheet") == 1


@pytest.mark.parametrize("path", ["http://[x/", "//[/", "/\x00", "/ratings/../../key.json", "/%2e%2e/key.json", "*"])
def test_odd_addresses_are_answered(server, path):
    answer = talk(server, head(server, method="GET", path=path))
    assert status(answer) in (400, 404)
    assert b"item_id" not in answer


@pytest.mark.parametrize("request_", [b"\r\n", b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_request_is_let_go(server, request_):
    assert b"item_id" not in talk(server, request_ + b"\r\n\r\n")
    assert status(talk(server, head(server, method="GET", path="/"))) == 200


def test_headers_have_a_limit(server):
    many = head(server, *(f"X-{i}: y" for i in range(2000)), method="GET", path="/")
    long = head(server, "X: " + "y" * 100_000, method="GET", path="/")
    for request in (many, long):
        answer = talk(server, request)
        assert not answer or status(answer) == 431  # or closed with what we sent unread


def test_a_client_that_sends_a_byte_now_and_then_is_cut(tmp_path):
    """Each wait is short; it is the whole that takes too long."""
    with serving(tmp_path, lifetime=0.5) as server:
        for start in (b"GET / HT", head(server, "Content-Length: 1000") + b"{"):
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
                connection.sendall(start)
                connection.settimeout(0.05)
                while time.monotonic() - began < 8:
                    try:
                        if connection.send(b" ") and connection.recv(1000) == b"":
                            break
                    except TimeoutError:
                        continue
                    except OSError:
                        break
            assert 0.3 < time.monotonic() - began < 5


def test_connections_have_a_number(tmp_path):
    with serving(tmp_path, connections=2) as server:
        held = [socket.create_connection(("127.0.0.1", server.server_port), 10) for _ in range(2)]
        for connection in held:  # begun: each has its thread
            connection.sendall(b"GET /")
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as third:
            assert read(third) == b""
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 10
        while not (answer := talk(server, head(server, method="GET", path="/"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status(answer) == 200


def test_a_second_rater_of_the_same_name_does_not_pass_for_the_first(server):
    assert status(post(server, rating_sheets.filled(KEY, "Ann", 2, number=1))) == 200
    for name in ("Ann", "ANN", " ann "):
        answer = post(server, rating_sheets.filled(KEY, name, 5, number=2))
        assert status(answer) == 400
        assert b"has already returned a sheet; use another name" in answer
    assert status(post(server, rating_sheets.filled(KEY, "Bob", 5, number=2))) == 200
    ann, bob = stored_sheets(KEY, server.folder)
    assert {v for item in ann["items"].values() for v in item["ratings"].values()} == {2}
    assert (ann["rater"], bob["rater"]) == ("Ann", "Bob")


def test_names_that_were_there_before_the_server_count(tmp_path):
    with serving(tmp_path) as server:
        assert status(post(server, rating_sheets.filled(KEY, "Ann", 2, number=1))) == 200
    with serving(tmp_path) as server:
        assert status(post(server, rating_sheets.filled(KEY, "Ann", 5, number=2))) == 400
        assert status(post(server, rating_sheets.filled(KEY, "Ann", 4, number=1))) == 200  # her own, again


def test_raters_at_the_same_moment_do_not_share_a_name(server):
    answers = []
    threads = [
        threading.Thread(
            target=lambda n: answers.append(post(server, rating_sheets.filled(KEY, "Ann", 3, n))), args=(n,)
        )
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(map(status, answers)) == [200] + [400] * 7
    assert len(stored_sheets(KEY, server.folder)) == 1


def test_raters_have_a_number():
    sheet = {"rater_id": "new", "rater": "New"}
    many = {str(n): f"rater {n}" for n in range(MAX_RATERS)}
    with pytest.raises(UserError, match="expected at most 200 raters, found one more"):
        check_rater(sheet, many, "sheet")
    check_rater({"rater_id": "7", "rater": "rater 7"}, many, "sheet")


@pytest.mark.parametrize("name", ["\x1b[2JAnn", "A\nnn", "Ann\u202e", "\ud800", "\x9b31m", "\0"])
def test_a_name_is_something_to_print(server, name, capfd):
    answer = post(server, rating_sheets.filled(KEY, name))
    assert status(answer) == 400
    assert b"expected a name or initials" in answer
    assert "\x1b" not in "".join(capfd.readouterr())


def test_half_a_character_in_a_note_does_not_lose_the_sheet(server):
    sheet = rating_sheets.filled(KEY, "Ann")
    sheet["items"][KEY["items"][0]["item_id"]]["note"] = "good \ud83d"
    assert status(post(server, sheet)) == 200
    [stored] = stored_sheets(KEY, server.folder)
    assert stored["items"][KEY["items"][0]["item_id"]]["note"] == "good ?"


def test_a_rater_is_told_that_a_sheet_was_not_stored(server, capfd):
    server.folder.write_text("a file where the folder should be")
    answer = post(server, rating_sheets.filled(KEY, "Ann"))
    assert (status(answer), b"it could not be stored; save it as a file instead" in answer) == (400, True)
    assert str(server.folder).encode() not in answer
    assert capfd.readouterr().err.startswith(f"error: {server.folder}")
    server.folder.unlink()
    assert status(post(server, rating_sheets.filled(KEY, "Ann"))) == 200


def test_neither_key_nor_model_names_leave(server):
    page = talk(server, head(server, method="GET", path="/"))
    ids = {item["prompt_id"] for item in KEY["items"]}
    assert b"lora" not in page
    assert b'"model"' not in page
    assert not [name for name in ids if f'"{name}"'.encode() in page]
    answers = page + talk(server, head(server, path="/nothing")) + post(server, {"sheet_id": 1})
    assert server.token.encode() not in answers.replace(b"?token=", b"")
    assert str(server.folder).encode() not in answers


def test_pages_elsewhere_may_not_read_the_answers(server):
    answer = talk(server, head(server, "Origin: http://evil.example", method="GET", path="/")).split(b"\r\n\r\n")[0]
    assert b"Access-Control" not in answer
    assert b"Cross-Origin-Resource-Policy: same-origin" in answer
    assert b"X-Frame-Options: DENY" in answer
    assert b"Cache-Control: no-store" in answer
