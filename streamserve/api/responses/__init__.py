"""``/v1/responses``: OpenAI's Responses API over the chat that the other endpoints serve.

A body is read into a chat request (``request``, ``items``, ``tools``); what the parsers say of the
answer becomes output items and typed events (``output``, ``frames``); what was answered may be kept
in memory (``store``), and looked at or gone on with; an answer may be written with nobody there
(``background``).
"""
