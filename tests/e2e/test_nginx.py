"""nginx in front, as docs/deployment.md configures it: streams pass it token by token."""

import asyncio
import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.api.harness import Api, chat_body, until
from tests.api.test_http import CHAT, talking
from tests.api.test_promise_resume import Client as Reader

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
DOCS = Path(__file__).parents[2] / "docs" / "deployment.md"

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def configuration(folder, upstream):
    """The one of the page, with its server listening on a socket of the file system."""
    [text] = re.findall(r"```nginx\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    servers = re.sub(r"server 127\.0\.0\.1:8000;\s*server .*?;", f"server {upstream};", text)
    assert servers != text
    servers = servers.replace("listen 80;", f"listen unix:{folder}/listen;")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"pid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{servers}}}\n"
    )


async def is_listening(path):
    """The socket's file is there a moment before anybody listens."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@contextlib.asynccontextmanager
async def behind_nginx(folder, address):
    """Yields the path of the socket that nginx listens on."""
    file = folder / "nginx.conf"
    file.write_text(configuration(folder, "{}:{}".format(*address)), encoding="utf-8")
    process = subprocess.Popen(
        [NGINX, "-p", str(folder), "-c", str(file), "-g", "daemon off; master_process off;"],
        stderr=subprocess.PIPE,
    )
    listen = folder / "listen"
    try:
        async with asyncio.timeout(60):
            while not await is_listening(str(listen)):
                assert process.poll() is None, process.stderr.read().decode()
                await asyncio.sleep(0.01)
        yield str(listen)
    finally:
        process.terminate()
        process.communicate()


def connected_to(path):
    return talking(asyncio.open_unix_connection(path))


async def test_every_token_passes_when_it_is_there(tmp_path):
    api = Api(is_held=True)
    async with (
        api.serving() as address,
        behind_nginx(tmp_path, address) as path,
        connected_to(path) as client,
    ):
        await client.send("POST", CHAT, chat_body(stream=True, max_tokens=4))
        status, headers = await client.head()
        assert status == 200
        assert headers["Content-Type"].startswith("text/event-stream")
        for letter in b"abc":
            await api.pace.step()  # no further token exists while this one is waited for
            received = b""
            while b'"content":"%c"' % letter not in received:
                received += await client.chunk()
        api.pace.let_go()
        assert b"[DONE]" in b"".join(await client.chunks())


async def test_who_leaves_nginx_leaves_the_engine(tmp_path):
    api = Api(is_held=True)
    async with api.serving() as address, behind_nginx(tmp_path, address) as path:
        async with connected_to(path) as client:
            await client.send("POST", CHAT, chat_body(stream=True, max_tokens=100))
            await api.pace.step()
            await client.head()
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
    assert api.num_used_blocks == 0


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_broken_connection_is_gone_on_with_behind_nginx(tmp_path, method):
    api = Api(is_held=True)
    reader = Reader()
    body = chat_body(stream=True, max_tokens=9)
    async with api.serving() as address, behind_nginx(tmp_path, address) as path:
        async with connected_to(path) as client:
            await client.send("POST", CHAT, body, headers=["X-Stream-Resume: 1"])
            stream_id = (await client.head())[1]["x-stream-id"]
            for letters in ("a", "ab", "abc"):
                await api.pace.step()
                while reader.content != letters:
                    reader.feed(await client.chunk())
        assert reader.last_id == f"{stream_id}.3"
        kept = api.app.context.kept._by_id[stream_id]
        await until(lambda: not kept.is_read)  # the server knows that it broke
        await api.pace.step()  # and goes on
        async with connected_to(path) as client:
            at = [f"Last-Event-ID: {reader.last_id}"]
            if method == "POST":
                await client.send("POST", CHAT, body, headers=at)
            else:
                await client.send("GET", f"/v1/streams/{stream_id}", headers=at)
            assert (await client.head())[0] == 200
            reader.feed(await client.chunk())
            assert reader.content == "abcd"
            api.pace.let_go()
            reader.feed(b"".join(await client.chunks()))
        assert reader.content == "abcdefghi"
        assert reader.is_done
        assert reader.ids == [*range(10), 9]
        assert api.app.context.metrics.num_finished["length"] == 1
