"""Log lines as JSON."""

import json
import logging
import sys

from streamserve.cli.logs import JsonFormatter


def line_of(record):
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_is_an_object_with_what_it_is_about():
    record = logging.getLogger("streamserve.requests").makeRecord(
        "streamserve.requests", logging.INFO, "f", 1, "%s ended", ("chatcmpl-1",), None,
        extra={"request_id": "chatcmpl-1", "output_tokens": 3},
    )  # fmt: skip
    record.created = 1_700_000_000.25
    assert line_of(record) == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "info",
        "logger": "streamserve.requests",
        "message": "chatcmpl-1 ended",
        "request_id": "chatcmpl-1",
        "output_tokens": 3,
    }


def test_lines_that_a_client_has_a_hand_in_stay_one_line():
    try:
        raise ValueError('two\nlines "quoted"')
    except ValueError:
        record = logging.makeLogRecord({"msg": "a\nb", "exc_info": sys.exc_info()})
    line = line_of(record)
    assert line["message"] == "a\nb"
    assert line["exception"].endswith('ValueError: two\nlines "quoted"')
