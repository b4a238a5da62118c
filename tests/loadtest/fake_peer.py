"""A server to compare with, in a process of its own: ``python fake_peer.py PORT BEHAVIOUR``.

``good`` answers; ``dies`` ends before it is ready; ``breaks`` ends with its third chat; ``hangs``
does not answer its fifth.
"""

import asyncio
import os
import sys

_EVENT = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
_LAST = (
    b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}\n\n'
    b"data: [DONE]\n\n"
)


async def main(port: int, behaviour: str) -> None:
    num_chats = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_chats
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")
        if head.startswith(b"GET"):
            writer.write(b"Content-Length: 0\r\n\r\n")
        else:
            num_chats += 1
            if behaviour == "breaks" and num_chats == 3:
                os._exit(1)
            writer.write(b"\r\n")
            if behaviour == "hangs" and num_chats == 5:
                await asyncio.Event().wait()
            writer.write(_EVENT * 3 + _LAST)
        await writer.drain()
        writer.close()

    if behaviour == "dies":
        print("no such model", flush=True)
        raise SystemExit(3)
    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
