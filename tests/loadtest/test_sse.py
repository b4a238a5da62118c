"""Events come out whole, however the socket cuts them."""

import httptools
import pytest

from streamserve_loadtest.sse import EventParser, ResponseParser

BODY = b': ping\n\ndata: {"a": 1}\n\nevent: x\nid: 7\ndata: two\ndata:lines\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b"two\nlines", b"[DONE]"]


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", range(1, 30))
def test_events_do_not_depend_on_the_cuts(size):
    parser = EventParser()
    found = []
    for start in range(0, len(BODY), size):
        found += parser.feed(BODY[start : start + size])
    assert found == EVENTS


def test_lines_may_end_in_carriage_returns():
    assert EventParser().feed(b"data: 1\r\n\r\ndata: 2\r\n\r\n") == [b"1", b"2"]


def test_an_event_without_its_blank_line_is_not_one():
    assert EventParser().feed(b"data: 1\n") == []


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_a_chunked_response(size, chunk_size):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = head + chunked(BODY, chunk_size)
    found: list[bytes] = []
    parser = ResponseParser(found.append)
    for start in range(0, len(response), size):
        assert not parser.is_complete
        parser.feed(response[start : start + size])
    assert parser.is_complete
    assert parser.status == 200
    assert found == EVENTS


def test_an_error_keeps_its_body():
    found: list[bytes] = []
    parser = ResponseParser(found.append)
    parser.feed(b"HTTP/1.1 429 Too Many\r\nContent-Length: 12\r\n\r\ndata: full\n\n")
    assert (parser.status, parser.body, found) == (429, b"data: full\n\n", [])


def test_what_is_not_http_is_refused():
    with pytest.raises(httptools.HttpParserError):
        ResponseParser(lambda _data: None).feed(b"SSH-2.0-x\r\n\r\n")
