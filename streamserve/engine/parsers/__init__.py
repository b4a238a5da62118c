"""From what a model writes to what a chat message holds: reasoning, content and tool calls.

Every parser takes text in pieces and decides by the text alone: however it is cut, what the events
say, put together, is the same. What is not well-formed comes out as content.
"""
