"""The chat page in a real browser, on a real server with a ``NullRunner``."""

import asyncio
import contextlib

import pytest

from streamserve.engine.null_runner import NullRunner
from tests.api.harness import Api, HeldPace, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARKDOWN = """# Title

Some **bold**, *soft*, `code`, ~~gone~~ and [a link](https://example.com/a_(b) "t").
Next line, https://example.com/x.

1. one
2. two
   - inner **item**

| a | b |
|---|--:|
| 1 | `x|y` \\| z |

> quoted

```python
if a < b:
    print("<b>")
```

last
"""

HOSTILE = """<img src=x onerror="window.wasRun=1"> </script><script>window.wasRun=2</script>

[click](javascript:window.wasRun=3) [data](data:text/html,<script>window.wasRun=4</script>)
[shy](JaVaScRiPt:window.wasRun=5) <javascript:window.wasRun=6> ![i](http://127.0.0.1:1/i.png)
[rel](/v1/models) <svg onload=window.wasRun=7><a href="javascript:window.wasRun=8">x</a>

```html"><img src=x onerror=window.wasRun=9>
<script>window.wasRun=10</script>
```

| <img src=x onerror=window.wasRun=11> | b |
|--|--|
| <iframe srcdoc="<script>parent.wasRun=12</script>"> | c |
"""


@contextlib.asynccontextmanager
async def open_page(browser, text="Hello there!", *, path="/", is_held=False, **config):
    """The page of a server that answers ``text`` once, at once or step by step."""
    pace = HeldPace(is_held=is_held)
    ids = (*text.encode(), 257)  # the end-of-sequence token
    api = Api(runner=NullRunner(ids, pace=pace), max_model_len=4096, num_blocks=1024, **config)
    api.pace = pace
    async with api.serving() as (host, port):
        page = await browser.page(f"http://{host}:{port}{path}")
        yield api, page
        # Connections that the page keeps would hold the server up.
        await page.call("Page.navigate", url="about:blank")


async def say(page, text):
    await page.run("document.getElementById('input').focus()")
    await page.type(text)
    await page.press("Enter", 13)


async def answered(page, count=1):
    await page.until(
        f"document.querySelectorAll('.answer').length === {count}"
        " && !document.querySelector('.streaming')"
    )


async def html(page):
    return await page.run("document.querySelector('.text').innerHTML")


async def test_an_answer_streams_and_shows_its_figures(browser):
    async with open_page(browser, is_held=True) as (api, page):
        await say(page, "Hi")
        for _ in "Hel":
            await api.pace.step()
        await page.until("document.querySelector('.text')?.textContent === 'Hel'")
        assert await page.run("document.querySelector('.said').textContent") == "Hi"
        assert await page.run("document.getElementById('stop').hidden") is False
        api.pace.let_go()
        await answered(page)
        assert await html(page) == "<p>Hello there!</p>"
        figures = await page.run("document.querySelector('.under').textContent")
        assert "to first token" in figures
        assert "tokens/s" in figures
        assert "13 tokens" in figures  # the server's count: with the last one's end
        assert "apart, p99" in figures
        assert await page.run("document.querySelector('.spark .line').getAttribute('d')")
        assert "in the queue" in await page.run("document.querySelector('.under').title")
        assert page.complaints == []


async def test_markdown_is_drawn_and_is_the_same_however_it_comes(browser):
    async with open_page(browser, MARKDOWN) as (_, page):
        await say(page, "Hi")
        await answered(page)
        streamed = await html(page)
        at_once = await page.run(
            "(() => { const root = document.createElement('div');"
            f"new MarkdownView(root).show({MARKDOWN!r}); return root.innerHTML; }})()"
        )
        assert streamed == at_once
        for part in (
            "<h1>Title</h1>",
            "<strong>bold</strong>, <em>soft</em>, <code>code</code>, <del>gone</del>",
            '<a href="https://example.com/a_(b)" target="_blank" '
            'rel="noopener noreferrer nofollow">a link</a>.<br>Next line, ',
            ">https://example.com/x</a>.</p>",
            "<ol><li>one</li><li>two<ul><li>inner <strong>item</strong></li></ul></li></ol>",
            "<table><thead><tr><th>a</th>",
            "<blockquote><p>quoted</p></blockquote>",
            '<pre><code>if a &lt; b:\n    print("&lt;b&gt;")</code></pre>',
            "<span>python</span><button",
            "<p>last</p>",
        ):
            assert part in streamed, part
        assert page.complaints == []


async def test_markdown_growing_by_a_character_ends_as_the_whole(browser):
    async with open_page(browser) as (_, page):
        assert await page.run(
            "(() => { const [grown, whole] = [0, 1].map(() => document.createElement('div'));"
            f"const text = {MARKDOWN!r}; const view = new MarkdownView(grown);"
            "for (let n = 1; n <= text.length; n += 1) view.show(text.slice(0, n));"
            "new MarkdownView(whole).show(text); return grown.innerHTML === whole.innerHTML; })()"
        )


async def test_a_hostile_answer_is_text(browser):
    async with open_page(browser, HOSTILE) as (_, page):
        await say(page, "<img src=x onerror=window.wasRun=20>")
        await answered(page)
        for selector in ("a", "button.small"):  # whatever can be clicked
            await page.run(
                f"document.querySelectorAll('.text {selector}').forEach((node) => {{"
                "node.target = '_self'; if (!node.href?.startsWith('http')) node.click(); })"
            )
        await page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        assert await page.run("typeof window.wasRun") == "undefined"
        tags = await page.run(
            "[...new Set([...document.querySelectorAll('.log *')].map((n) => n.tagName))].join()"
        )
        assert not {"IMG", "SCRIPT", "IFRAME"} & set(tags.split(","))
        links = await page.run("[...document.querySelectorAll('.text a')].map((a) => a.href)")
        assert links == ["http://127.0.0.1:1/i.png"]
        text = await page.run("document.querySelector('.text').textContent")
        assert "[click](javascript:window.wasRun=3)" in text
        assert "</script><script>window.wasRun=2</script>" in text
        assert page.complaints == []


async def test_no_text_takes_time_squared(browser):
    """A hundred thousand characters of what opens and is never closed: drawn, and all there."""
    pieces = ["[", "![a](", "*a ", "**a", "_a_b", "~~a ", "`a ``", "<a:", "a\n", "- a\n", "> a\n"]
    async with open_page(browser) as (_, page):
        for piece in pieces:
            text = f"{piece!r}.repeat({100_000 // len(piece)})"
            letters = await page.run(
                "(() => { const root = document.createElement('div');"
                f"new MarkdownView(root).show({text});"
                "return root.textContent.replace(/[^a]/g, '').length; })()"
            )
            assert letters == piece.count("a") * (100_000 // len(piece)), piece


async def test_the_policy_stops_what_the_page_itself_would_not_do(browser):
    async with open_page(browser) as (_, page):
        assert (
            await page.run(
                "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'set'; }"
                "catch (error) { return error.name; } })()"
            )
            == "TypeError"
        )
        await page.run("fetch('http://127.0.0.1:1/').then(() => 'sent', () => 'stopped')")
        async with asyncio.timeout(60):
            while not any("connect-src" in complaint for complaint in page.complaints):
                await page.run("1")  # the log is told beside the answers


async def test_stop_ends_the_request_on_the_server(browser):
    async with open_page(browser, is_held=True) as (api, page):
        await say(page, "Hi")
        for _ in "Hel":
            await api.pace.step()
        await page.until("document.querySelector('.text')?.textContent === 'Hel'")
        assert not api.engine.is_idle
        await page.press("Escape", 27)
        await page.until("document.querySelector('.note')?.textContent === 'Stopped.'")
        api.pace.let_go()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0
        assert await page.run("document.getElementById('stop').hidden")
        assert await html(page) == "<p>Hel</p>"
        # The next turn tells what was said.
        await say(page, "Go on")
        await answered(page, 2)


async def test_turns_settings_and_another_answer(browser):
    async with open_page(browser) as (api, page):
        bodies = "window.bodies = []; const real = window.fetch; window.fetch = (url, options) => {"
        bodies += "if (options?.body) window.bodies.push(JSON.parse(options.body));"
        bodies += "return real(url, options); }; 1"
        await page.run(bodies)
        await page.run(
            "document.getElementById('system').value = 'Be kind.';"
            "document.getElementById('temperature').value = '0.5';"
            "document.getElementById('seed').value = '7'; 1"
        )
        await say(page, "One")
        await answered(page)
        await say(page, "Two")
        await answered(page, 2)
        await page.run("[...document.querySelectorAll('.again')].pop().click()")
        await answered(page, 2)
        first, second, again = await page.run("window.bodies")
        system = {"role": "system", "content": "Be kind."}
        one, two = ({"role": "user", "content": text} for text in ("One", "Two"))
        hello = {"role": "assistant", "content": "Hello there!"}
        assert first["messages"] == [system, one]
        assert second["messages"] == again["messages"] == [system, one, hello, two]
        assert (first["temperature"], first["seed"]) == (0.5, 7)
        assert first["stream_options"]["include_timing"] is True
        assert "top_p" not in first
        assert api.engine.is_idle


async def test_several_chats_side_by_side(browser):
    async with open_page(browser, is_held=True) as (api, page):
        for _ in range(3):
            await page.run("document.getElementById('more').click()")
        await say(page, "Hi")
        await until(lambda: api.engine.stats().num_running + api.engine.stats().num_waiting == 4)
        await api.pace.step()
        await until(lambda: api.engine.stats().num_running == 4)
        api.pace.let_go()
        await answered(page, 4)
        texts = await page.run("[...document.querySelectorAll('.text')].map((t) => t.textContent)")
        assert texts == ["Hello there!"] * 4
        # To one of them only.
        await page.run(
            "document.querySelectorAll('.pane')[2].dispatchEvent(new Event('pointerdown'))"
        )
        await page.run("document.querySelector('[name=to][value=one]').click()")
        await say(page, "And you?")
        await answered(page, 5)
        counts = await page.run(
            "[...document.querySelectorAll('.pane')].map((p) => p.querySelectorAll('.said').length)"
        )
        assert counts == [1, 1, 2, 1]


async def test_a_server_with_keys_is_asked_with_one(browser):
    async with open_page(browser, api_keys=("secret",)) as (_, page):
        await page.until("document.getElementById('settings').open")
        await page.until("document.activeElement.id === 'key'")
        await page.run("document.getElementById('settings').close()")
        await say(page, "Hi")
        await page.until("document.querySelector('.wrong')?.hidden === false")
        assert "API key" in await page.run("document.querySelector('.wrong').textContent")
        await page.until("document.activeElement.id === 'key'")
        await page.type("secret")
        await page.press("Enter", 13)
        await page.until("!document.getElementById('settings').open")
        await page.until("document.getElementById('model-name').textContent === 'null-model'")
        await say(page, "Hi")
        await answered(page, 2)
        assert "Hello there!" in await page.run("document.querySelector('.log').textContent")


async def test_errors_are_said_in_words(browser):
    async with open_page(browser) as (_, page):
        await page.run("document.getElementById('max_tokens').value = '100000'; 1")
        await say(page, "Hi")
        await page.until("document.querySelector('.wrong')?.hidden === false")
        message = await page.run("document.querySelector('.wrong').textContent")
        assert "maximum context length" in message


async def test_the_page_of_the_api_lists_every_field(browser):
    async with open_page(browser, path="/docs") as (_, page):
        await page.until("document.querySelectorAll('details').length > 5")
        names = await page.run(
            "[...document.querySelectorAll('details:first-child tr[data-name]')]"
            ".map((row) => row.dataset.name)"
        )
        assert {"messages", "temperature", "stream_options.include_timing", "audio"} <= set(names)
        await page.run(
            "(() => { const input = document.getElementById('filter'); input.value = 'min_p';"
            "input.dispatchEvent(new Event('input')); })()"
        )
        shown = await page.run(
            "[...document.querySelectorAll('tr[data-name]:not([hidden])')].map(r => r.dataset.name)"
        )
        assert set(shown) == {"min_p"}
        assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_fits_a_phone_in_both_colours(browser, scheme):
    async with open_page(browser, MARKDOWN) as (_, page):
        await page.emulate(width=390, height=844, scheme=scheme)
        await say(page, "Hi")
        await answered(page)
        assert await page.run("document.documentElement.scrollWidth") == 390
        colours = "getComputedStyle(document.documentElement).colorScheme"
        assert await page.run(colours) == scheme
        await page.run("document.getElementById('theme').click()")
        assert await page.run(colours) != scheme
        assert (await page.screenshot()).startswith(b"\x89PNG")
