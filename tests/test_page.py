"""The chat page in a real headless Chromium, against a real server, engine and (tiny) model.

Screenshots go to $NANOCHAT_SCREENSHOT_DIR, or are thrown away.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from tiny_chat import INJECTION, STORY, running_server, text_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def server():
    with running_server() as (engine, port, _):
        yield engine, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the chat in a fresh browser profile; at the end nothing may have gone wrong in it or left the machine."""
    contexts, problems = [], []

    def open_(**options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server[1]) or problems.append(request.url))
        page.goto(server[1])
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("NANOCHAT_SCREENSHOT_DIR") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")


def ask(page, text, n_answers):
    """Send a message by keyboard and wait for the whole answer; returns the answer's element."""
    box = page.get_by_role("textbox", name="Message")
    box.fill(text)
    box.press("Enter")
    return finished(page, n_answers)


def finished(page, n_answers):
    answer = page.locator(".message.assistant").nth(n_answers - 1)
    answer.get_by_role("button", name="Regenerate").wait_for()
    return answer


def test_a_conversation(open_page, screenshot):
    """Streamed answers, a folded tool call, code, history sent along, kept over a reload, and a new chat."""
    page = open_page()
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    screenshot(page, "welcome")
    answer = ask(page, "What is 37*48?", 1)
    assert answer.locator("p").evaluate("node => [...node.childNodes].map(n => n.nodeName)") == [
        "#text",
        "DETAILS",
        "#text",
    ]
    trace = answer.get_by_text("37*48 = 1776")
    assert not trace.is_visible() and re.search(r"\d+ tokens · [\d.]+ tokens/s · first after", answer.inner_text())
    answer.get_by_text("Used the calculator").click()
    assert trace.is_visible()
    answer = ask(page, "Show me code", 2)
    assert answer.locator("pre").inner_text().strip() == "for i in range(3):\n    print(i < 2)"
    assert answer.locator(".code").get_by_text("python", exact=True).is_visible()
    assert answer.locator("p code").inner_text() == "True"
    assert ask(page, "Hello", 3).locator(".text").inner_text() == text_of("Hello")
    assert trace.is_visible()  # what was unfolded stays unfolded
    screenshot(page, "light")
    history = sent[2]["messages"]
    assert [message["role"] for message in history] == ["user", "assistant"] * 2 + ["user"]
    assert history[1]["content"] == [
        {"type": "text", "text": "37*48 is "},
        {"type": "python", "text": "37*48"},
        {"type": "python_output", "text": "1776"},
        {"type": "text", "text": "1776."},
    ]
    assert history[3]["content"] == text_of("Show me code")
    page.reload()
    assert page.locator(".message").count() == 6
    page.get_by_role("button", name="Regenerate").click()  # the same again: the server had kept it
    assert "kept from before" in finished(page, 3).inner_text()
    assert ask(page, "What is 37*48?", 4).locator(".text").inner_text().endswith("1776.")
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0 and page.get_by_text("Hello. Ask me something.").is_visible()
    page.reload()
    assert page.locator(".message").count() == 0


def test_chats_are_listed_opened_and_deleted(open_page, screenshot):
    page = open_page()
    page.get_by_role("button", name="Chats").click()
    chats = page.get_by_role("navigation", name="Chats")
    ask(page, "What is 37*48?", 1)
    page.get_by_role("button", name="New chat").click()
    ask(page, "Hello", 1)
    assert chats.locator(".open").all_inner_texts() == ["Hello", "What is 37*48?"]
    screenshot(page, "chats")
    chats.get_by_role("button", name="What is 37*48?", exact=True).click()
    assert "1776" in page.locator(".message.assistant").inner_text()
    page.reload()
    assert "1776" in page.locator(".message.assistant").inner_text()
    page.get_by_role("button", name="Chats").click()
    chats.get_by_role("button", name="Delete chat: What is 37*48?").click()
    assert page.locator(".message").count() == 0 and chats.locator(".open").all_inner_texts() == ["Hello"]
    page.reload()
    page.get_by_role("button", name="Chats").click()
    chats.get_by_role("button", name="Delete chat: Hello").click()
    page.reload()
    assert page.evaluate("localStorage.getItem('nanochat.chats')") == "[]"


def test_a_question_is_edited_and_sent_again(open_page, screenshot):
    """All that came after it goes; the keyboard does it too, and Escape leaves everything as it was."""
    page = open_page()
    ask(page, "Hello", 1)
    ask(page, "What is 37*48?", 2)
    page.locator(".message.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    editor = page.get_by_role("textbox", name="Edit message")
    assert editor.input_value() == "Hello"
    editor.fill("Show me code")
    screenshot(page, "editing")
    page.get_by_role("button", name="Send again").click()
    answer = finished(page, 1)
    page.wait_for_function("document.querySelectorAll('.message').length === 2")
    assert answer.locator("pre").count() == 1 and page.locator(".message.user").inner_text().startswith("Show me code")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    assert editor.count() == 0 and page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Control+a")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    page.get_by_text(text_of("Hello")).wait_for()
    assert page.locator(".message").count() == 2


def test_reasoning_is_folded_and_stays_here(browser, tmp_path, screenshot):
    """A model is picked by its name; what it says to itself is shown when asked for, as text, and never sent back."""
    pytest.importorskip("transformers", reason="makes the model; not installed")
    import tiny_hf

    oss, sent, context = tiny_hf.scripted_gpt_oss(tmp_path / "oss"), [], browser.new_context()
    with running_server(more={"me/oss": oss}) as (_, port, _):
        page = context.new_page()
        page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
        page.goto(f"http://127.0.0.1:{port}/")
        picker = page.get_by_role("combobox", name="Model")
        picker.wait_for()
        assert picker.locator("option").all_inner_texts() == ["tiny", "me/oss"]
        picker.select_option("me/oss")
        answer = ask(page, "What is 2 and 2?", 1)
        assert answer.locator(".text").inner_text() == tiny_hf.ANSWER.replace("**", "")
        thought = answer.locator(".thought div")
        assert not thought.is_visible()
        answer.get_by_text("Thought").click()
        assert (
            thought.is_visible() and thought.inner_text() == tiny_hf.REASONING and page.locator("#log b").count() == 0
        )
        screenshot(page, "reasoning")
        ask(page, "And 3?", 2)
        assert thought.first.is_visible()
        page.reload()
        picker.locator("option").nth(1).wait_for(state="attached")
        assert picker.input_value() == "me/oss" and page.locator(".thought").count() == 2
        assert [body["model"] for body in sent] == ["me/oss"] * 2
        assert sent[1]["messages"][1] == {"role": "assistant", "content": tiny_hf.ANSWER}
    context.close()


def test_settings_and_model_go_with_the_request(open_page):
    page = open_page()
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.get_by_role("button", name="Settings").click()
    chosen = {"Temperature": "0.5", "Seed": "7", "Top p": "0.9", "Top k": "40", "Longest answer": "30"}
    for label, value in {**chosen, "Instructions": "Be brief."}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Appearance").select_option("dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 22)"
    page.keyboard.press("Escape")
    page.reload()  # they are kept
    page.get_by_role("combobox", name="Model").wait_for()
    ask(page, "Hello", 1)
    (body,) = sent
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["model"] == "tiny"
    assert {name: body[name] for name in ("temperature", "seed", "top_p", "top_k", "max_tokens")} == {
        "temperature": 0.5,
        "seed": 7,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 30,
    }


MARKDOWN = """# Title
A **bold *and slanted*** word, `x < y`, snake_case_name, 2*3*4, ~~gone~~ and \\*stars\\*.
Same paragraph, [a link](https://example.org/a_b) and https://example.org/x.

> quoted
> > twice

- one
  - inner
    1. deep
- two

3. third
4. fourth

| a | b |
|---|:-:|
| 1 | `2` |

---
[bad](javascript:alert(1)) ![image](https://example.org/i.png) <b>raw</b>
~~~
# not a title ```
~~~
```
unfinished"""


def rendered(page, text):
    """HTML of an answer that says `text`, drawn by the page."""
    page.evaluate(
        """text => {
            chat.messages.push({ role: "user", parts: [{ type: "text", text: "?" }] },
                               { role: "assistant", parts: [{ type: "text", text }] });
            render();
        }""",
        text,
    )
    return page.locator(".message.assistant .text").last


def test_markdown(open_page, screenshot):
    page = open_page()
    text = rendered(page, MARKDOWN.replace("\\\\", "\\"))
    html = text.inner_html()
    for part in (
        "<h3>Title</h3>",
        "A <strong>bold <em>and slanted</em></strong> word, <code>x &lt; y</code>, snake_case_name, 2*3*4, <s>gone</s>",
        "and *stars*.\nSame paragraph",
        "<blockquote><p>quoted</p><blockquote><p>twice</p></blockquote></blockquote>",
        "<ul><li><p>one</p><ul><li><p>inner</p><ol><li><p>deep</p></li></ol></li></ul></li><li><p>two</p></li></ul>",
        '<ol start="3"><li><p>third</p></li><li><p>fourth</p></li></ol>',
        "<tr><th>a</th><th>b</th></tr><tr><td>1</td><td><code>2</code></td></tr>",
        "<hr><p>[bad](javascript:alert(1)) ",
        "&lt;b&gt;raw&lt;/b&gt;</p>",
        "<code># not a title ```</code>",
        "<code>unfinished</code>",
    ):
        assert part in html, (part, html)
    links = text.locator("a").evaluate_all("nodes => nodes.map(n => [n.textContent, n.href, n.rel, n.target])")
    assert [link[:2] for link in links] == [
        ["a link", "https://example.org/a_b"],
        ["https://example.org/x", "https://example.org/x"],
        ["image", "https://example.org/i.png"],
    ]
    assert all("noopener" in link[2] and link[3] == "_blank" for link in links)
    assert page.locator("#log img, #log b").count() == 0
    screenshot(page, "markdown")


def test_hostile_markdown_is_drawn_in_time(open_page):
    """Long runs of half-open marks and deep nesting end soon, and no text is lost."""
    page = open_page()
    for text in (
        ">" * 5000 + " x",
        "  " * 200 + "- " * 3000 + "x",
        "**a " * 4000,
        "[" * 6000,
        "`" * 5001,
        "*_" * 5000,
        "|" * 5000 + "\n" + "|-" * 5000,
        "- a\n" * 3000,
        "\ufffc" * 100,
        "```" * 3000,
        "\u202e<script>alert(1)</script>\0",
    ):
        started = time.time()
        rendered(page, text)
        assert time.time() - started < 5, text[:20]


def test_an_answer_streams_and_can_be_stopped(open_page, server):
    engine, _ = server
    step, seen = engine.step, []

    def slow_step():
        time.sleep(0.03)
        return step()

    page, engine.step = open_page(), slow_step
    try:
        page.get_by_role("textbox", name="Message").fill("Tell me a story")
        page.get_by_role("button", name="Send").click()
        answer = page.locator(".message.assistant .text")
        answer.wait_for()
        for length in (10, 40, 70):
            page.wait_for_function(
                "n => document.querySelector('.assistant .text')?.textContent.length > n", arg=length
            )
            seen.append(answer.inner_text())
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
    finally:
        engine.step = step
    text = answer.inner_text()
    assert STORY.startswith(text) and len(text) < len(STORY)
    assert all(STORY.startswith(part) for part in seen) and len(set(seen)) == 3
    page.wait_for_timeout(500)
    assert not engine.running and answer.inner_text() == text
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function("text => document.querySelector('.assistant .text')?.textContent === text", arg=STORY)
    assert page.locator(".message").count() == 2


def test_nothing_written_becomes_markup(open_page, screenshot):
    page = open_page()
    answer = ask(page, "Inject something", 1)
    assert answer.locator(".text").inner_text() == INJECTION
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    mine = '<img src=x onerror="window.hacked=2"><script>window.hacked=2</script>```<b>x</b>'
    ask(page, mine, 2)
    assert mine.split("```")[0] in page.locator(".message.user").nth(1).inner_text()
    page.reload()
    assert page.locator("#log img, #log script, #log b").count() == 0
    assert page.evaluate("window.hacked") is None
    screenshot(page, "injection")


def test_errors_are_said_in_words(open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("5")
    page.keyboard.press("Escape")
    assert not page.get_by_label("Longest answer").is_visible()
    ask(page, "Tell me a story", 1)
    assert page.get_by_text("cut at the length limit").is_visible()
    page.route("**/chat/completions", lambda route: route.abort())
    ask(page, "Hello", 2)
    assert page.get_by_role("alert").inner_text() == "The server cannot be reached. Is it still running?"
    page.unroute("**/chat/completions")
    ask(page, "x" * (2 << 20), 3)  # a body the real server refuses
    assert "exceeds" in page.get_by_role("alert").last.inner_text()


def test_a_server_that_has_gone(browser):
    """A real one, stopped: said in words, and what was asked is not lost."""
    with running_server() as (_, port, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        ask(page, "Hello", 1)
    ask(page, "What is 37*48?", 2)
    assert page.get_by_role("alert").inner_text() == "The server cannot be reached. Is it still running?"
    assert page.evaluate("JSON.parse(localStorage['nanochat.chats'])[0].messages.length") == 4
    context.close()


def test_a_server_that_comes_back(browser):
    """At the same address, with another model: what failed is asked again, of a model that is there."""
    context = browser.new_context()
    page = context.new_page()
    with running_server() as (_, port, _):
        page.goto(f"http://127.0.0.1:{port}/")
        ask(page, "Hello", 1)
    ask(page, "What is 37*48?", 2)
    with running_server(model_name="other", port=port):
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_text("there is no model 'tiny'").wait_for()
        page.get_by_label("Model").get_by_text("other").wait_for(state="attached")
        page.get_by_role("button", name="Regenerate").click()
        assert finished(page, 2).locator(".text").inner_text().endswith("1776.")
    context.close()


def test_two_tabs_keep_each_others_chats(open_page, server):
    first = open_page()
    second = first.context.new_page()
    second.goto(server[1])
    for page, question in ((first, "Hello"), (second, "Who are you?"), (first, "What is 37*48?")):
        page.get_by_role("button", name="New chat").click()
        ask(page, question, 1)
    kept = "JSON.parse(localStorage['nanochat.chats']).map(chat => chat.title)"
    assert first.evaluate(kept) == ["What is 37*48?", "Who are you?", "Hello"]
    second.get_by_role("button", name="Chats", exact=True).click()
    second.get_by_role("button", name="What is 37*48?", exact=True).wait_for()


def test_what_the_browser_kept_may_be_damaged(open_page):
    """Chats that are whole are shown, whatever else is there."""
    page = open_page()
    for kept in (
        "5",
        "{",
        '"x"',
        "null",
        '[null, 3, {"messages": 5}, {"messages": [null]}, {"messages": [{}]}, WHOLE]',
    ):
        whole = '{"title": "Whole", "messages": [{"role": "user", "parts": [{"type": "text", "text": "Hello"}]}, '
        whole += '{"role": "assistant", "parts": [{"type": "text", "text": "Hi."}]}]}'
        broken = '{"title": "Broken", "messages": [{"role": "user", "parts": [{"type": "text"}]}]}'
        page.evaluate(
            "([chats, settings]) => { localStorage['nanochat.chats'] = chats; localStorage['nanochat.open'] = 'true'; "
            "localStorage['nanochat.settings'] = settings; }",
            [kept.replace("WHOLE", f"{broken}, {whole}"), kept],
        )
        page.reload()
        page.get_by_label("Model").get_by_text("tiny").wait_for(state="attached")
        assert page.locator(".message").all_inner_texts()[:1] == (["Hello"] if "WHOLE" in kept else [])


def test_the_page_works_with_keys(browser, monkeypatch):
    """The browser asks for a password, which is a key, and sends it along from then on."""
    monkeypatch.setenv("NANOCHAT_API_KEYS", "a-long-key")
    with running_server() as (_, port, _):
        for key, status in (("a-long-key", 200), ("another-key", 401)):
            context = browser.new_context(http_credentials={"username": "me", "password": key})
            page = context.new_page()
            assert page.goto(f"http://127.0.0.1:{port}/").status == status
            if status == 200:
                assert text_of("Hello") in ask(page, "Hello", 1).inner_text()
            context.close()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "has_touch": True}),
        ("phone-dark", {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark"}),
    ],
)
def test_every_appearance(open_page, screenshot, name, options):
    page = open_page(**options)
    screenshot(page, f"{name}-welcome")
    ask(page, "What is 37*48?", 1)
    answer = ask(page, "Show me code", 2)
    page.get_by_role("textbox", name="Message").fill("And a draft of mine\nin two lines")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    assert answer.bounding_box()["width"] > 300
    screenshot(page, name)
    page.get_by_role("button", name="Settings").click()
    screenshot(page, f"{name}-settings")


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("Hel")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#input").input_value() == "Hel\n"
    page.keyboard.press("Backspace")
    page.keyboard.type("lo")
    page.keyboard.press("Enter")
    finished(page, 1)
    assert page.evaluate("document.activeElement.id") == "input"
    controls = page.locator("button, textarea, input").all()
    assert all(control.evaluate("e => e.ariaLabel || e.textContent || e.labels?.length") for control in controls)
