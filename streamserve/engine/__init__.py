"""Step loop, streams, tokeniser, detokeniser: asyncio, no torch."""
