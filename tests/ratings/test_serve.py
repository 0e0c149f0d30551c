"""The server gives the page and takes ratings, to those who have its address, and nothing else to nobody."""

import http.client
import json

import pytest
import rating_sheets
from rating_sheets import serving

from rlhf.errors import UserError
from rlhf.ratings.collect import stored_sheets
from rlhf.ratings.serve import SheetServer
from rlhf.ratings.sheet import render_sheet

KEY = rating_sheets.key()


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as server:
        yield server


def ask(server, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_page_needs_the_token(server):
    assert ask(server, f"/?token={server.token}") == (200, render_sheet(KEY))
    for path in ("/", "/?token=", "/?token=wrong", f"/?token={server.token}x", "/?token=%ff"):
        assert ask(server, path)[0] == 403


def test_it_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url.startswith("http://127.0.0.1:")


def test_a_foreign_host_name_is_refused(server):
    assert ask(server, f"/?token={server.token}", Host="evil.example")[0] == 403
    assert ask(server, f"/?token={server.token}", Host="localhost:9")[0] == 200  # through an SSH tunnel


def test_what_is_sent_is_stored_and_sending_again_replaces_it(server):
    path = f"/ratings?token={server.token}"
    for value in (2, 5):
        body = json.dumps(rating_sheets.filled(KEY, "Ann", value))
        assert ask(server, path, "POST", body) == (200, "received")
    sheets = stored_sheets(KEY, server.folder)
    assert [sheet["rater"] for sheet in sheets] == ["Ann"]
    assert {v for item in sheets[0]["items"].values() for v in item["ratings"].values()} == {5}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ("{", 400, "expected JSON"),
        ("[]", 400, "expected a JSON object"),
        (json.dumps(rating_sheets.filled(KEY, "Ann", 9)), 400, "from 1 to 5"),
        (json.dumps({"sheet_id": KEY["sheet_id"], "rater": "\ud800", "rater_id": 1}), 400, "rater_id"),
        ("", 413, "expected 1 to"),
    ],
)
def test_what_is_no_sheet_is_not_stored(server, body, status, text):
    answer = ask(server, f"/ratings?token={server.token}", "POST", body)
    assert answer[0] == status
    assert text in answer[1]
    assert not list(server.folder.iterdir())


def test_a_size_that_is_too_large_or_unknown_is_refused_unread(server):
    for size in ("999999999999", "-5", "x"):
        path = f"/ratings?token={server.token}"
        assert ask(server, path, "POST", None, **{"Content-Length": size})[0] == 413


def test_nothing_else_can_be_read(server):
    body = json.dumps(rating_sheets.filled(KEY, "Ann"))
    assert ask(server, f"/ratings?token={server.token}", "POST", body)[0] == 200
    stored = next(server.folder.iterdir()).name
    for path in ("/key.json", "/../key.json", "/ratings", f"/ratings/{stored}", f"/{stored}", "/%2e%2e/key.json"):
        status, text = ask(server, f"{path}?token={server.token}")
        assert (status, text) == (404, "nothing here")
    page = ask(server, f"/?token={server.token}")[1]
    assert "Ann" not in page
    assert ask(server, f"/?token={server.token}", "DELETE")[0] == 501


def test_a_port_in_use_is_said(server):
    with pytest.raises(UserError, match=f"port: {server.server_port} cannot be used"):
        SheetServer("", KEY, server.folder, server.server_port)


def test_an_error_of_ours_is_one_line_without_the_request_and_a_client_that_left_is_none(server, capsys):
    for error in (ValueError("token"), ConnectionResetError("token")):
        try:
            raise error
        except (ValueError, OSError):
            server.handle_error(None, None)
    assert capsys.readouterr().err == "error: request: ValueError\n"


def test_a_sheet_may_be_as_large_as_the_limit(server, monkeypatch):
    path, body = f"/ratings?token={server.token}", json.dumps(rating_sheets.filled(KEY, "Ann"))
    monkeypatch.setattr("rlhf.ratings.serve.MAX_BYTES", len(body) - 1)
    assert ask(server, path, "POST", body) == (413, f"expected 1 to {len(body) - 1:,} bytes")
    monkeypatch.setattr("rlhf.ratings.serve.MAX_BYTES", len(body))
    assert ask(server, path, "POST", body) == (200, "received")
