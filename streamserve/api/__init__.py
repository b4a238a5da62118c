"""The HTTP front: OpenAI's API over ``engine.AsyncEngine``.

A request meets these modules in this order::

    server, protocol   uvicorn on uvloop; signals, draining, limits on headers
    app, middleware    routes; request id, CORS, API key
    generation, body   one request from its bytes to its answer, disconnect its guard
    chat_request, completion_request, sampling, fields   the body: honoured or refused, by table
    frames, logprobs   the bytes of chunks and answers
    sse, writer        the token path
    timing, progress   what a request is told about itself, if it asks
    tokens, pages, openapi, descriptions   the other endpoints; what there is, from the same tables
    metrics, context, errors   what all of them share
"""
