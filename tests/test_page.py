"""The page in a real browser, against the real server with the demo model."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from tests.browser import DEMO, chromium, free_port, linked, missing, served

PAGE = files("pocketlm.run") / "page" / "index.html"
QUESTION = "What is the capital of France?"


def in_browser(test):
    """Mark a test that drives the page, and say what is missing where it cannot."""
    return pytest.mark.slow(pytest.mark.skipif(missing() is not None, reason=missing() or "")(test))


def test_the_page_refers_to_nothing_outside_itself():
    text, references = PAGE.read_text(encoding="utf-8"), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: references.extend(
        value for name, value in attributes if name in ("src", "href", "srcset", "action")
    )
    parser.feed(text)
    assert references
    assert all(reference.startswith("data:") for reference in references)
    assert set(re.findall(r"\w+://[^'\"\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\(", text)


def test_what_a_model_says_can_only_become_text():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", PAGE.read_text(encoding="utf-8"))


def letters(text):
    """Return a text without its blanks, which a page lays out in its own way."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def files_to_compare(tmp_path_factory):
    return linked(DEMO, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def address(files_to_compare, tmp_path_factory):
    small, large = files_to_compare
    cache = tmp_path_factory.mktemp("cache")
    with served(small, "--compare", large, "--threads", 1, port=free_port(), cache=cache) as address:
        yield address


class Visit:
    """A person on the page: what they do and what they see."""

    def __init__(self, page, address):
        self.page = page
        self.requests, self.complaints = [], []
        page.on("request", lambda request: self.requests.append(request))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.set_default_timeout(300_000)
        page.goto(address)

    def setting(self, label, value):
        self.page.get_by_role("button", name="Settings").click()
        self.page.get_by_label(label).fill(str(value))
        self.page.keyboard.press("Escape")

    def single(self):
        self.page.get_by_role("button", name="Compare", pressed=True).click()

    def write(self, question):
        self.page.get_by_label("Your message").fill(question)
        self.page.locator("#send:enabled").wait_for()  # once it knows the models
        self.page.get_by_label("Your message").press("Enter")

    def ask(self, question):
        self.write(question)
        self.rest()

    def rest(self):
        self.page.get_by_role("button", name="Send").wait_for()

    def answers(self, role="optimised"):
        return self.page.get_by_role("group", name=f"Answer of the {role} model")

    def said(self, role="optimised"):
        return self.answers(role).locator(".said").all_text_contents()

    def bodies(self):
        return [json.loads(request.post_data) for request in self.requests if request.method == "POST"]


@pytest.fixture
def visit(browser):
    """Open the page in a fresh browser: `visit(address, **playwright's options of a context)`."""
    visits, contexts = [], []

    def start(address, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        visits.append(Visit(context.new_page(), address))
        return visits[-1]

    yield start
    for context in contexts:
        context.close()


@in_browser
def test_a_chat_streams_remembers_and_says_how_fast_it_was(visit, address):
    someone = visit(address)
    someone.single()
    someone.setting("Temperature", 0)
    someone.setting("System prompt", "You answer in one sentence.")
    someone.ask(QUESTION)
    someone.ask("And of Italy?")

    first, second = someone.said()
    assert "Paris" in first
    assert second
    for answer in someone.answers().all():
        line = answer.locator(".figures").inner_text()
        assert re.search(r"\d+(\.\d)? tokens/s", line)
        assert re.search(r"first token \d+(\.\d)? m?s", line)
    opening, after = someone.bodies()
    assert opening["stream"] is True
    assert opening["temperature"] == 0
    assert opening["messages"] == [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": QUESTION},
    ]
    assert [message["role"] for message in after["messages"]] == ["system", "user", "assistant", "user"]
    assert letters(after["messages"][2]["content"]) == letters(first)
    assert all(request.url.startswith(address) for request in someone.requests if not request.url.startswith("data:"))
    assert someone.complaints == []

    someone.page.reload()
    someone.answers().first.wait_for()
    assert someone.said() == [first, second]
    someone.page.get_by_role("button", name="New chat").click()
    someone.page.get_by_role("heading", name="small", exact=True).wait_for()
    assert someone.said() == []


@in_browser
@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_a_stopped_answer_stays_as_far_as_it_went_and_the_next_question_is_answered(visit, address, how):
    someone = visit(address)
    someone.single()
    someone.setting("Temperature", 0)
    someone.write("Write a very long story about a lighthouse keeper and the sea, with many chapters.")
    someone.page.locator(".said", has_text=re.compile(r"\w+ \w+ \w+")).first.wait_for()
    if how == "Stop":
        someone.page.get_by_role("button", name="Stop").click()
    else:
        someone.page.keyboard.press("Escape")
    someone.rest()
    stopped = someone.said()[0]
    assert someone.answers().first.get_by_text("stopped", exact=True).is_visible()
    someone.setting("Longest answer", 8)
    someone.ask("Are you still there?")
    assert someone.said()[0] == stopped
    assert someone.said()[1]
    assert someone.answers().nth(1).get_by_text("cut at the longest answer").is_visible()
    assert someone.complaints == []


@in_browser
def test_a_comparison_asks_both_and_each_remembers_its_own_answers(visit, address):
    someone = visit(address)
    someone.single()
    someone.setting("Temperature", 1.5)  # the files are the same: other draws tell their answers apart
    someone.setting("Seed", 1)
    someone.setting("Longest answer", 12)
    someone.ask("Name a fruit.")
    someone.setting("Seed", 2)
    someone.page.get_by_role("button", name="Compare").click()  # the other one catches up
    someone.rest()
    someone.ask("Name another.")

    small, large = someone.said("optimised"), someone.said("large")
    assert [body["model"] for body in someone.bodies()] == ["small", "large", "small", "large"]
    assert letters(small[0]) != letters(large[0])
    for body, said in zip(someone.bodies()[2:], (small, large), strict=True):
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
        assert letters(body["messages"][1]["content"]) == letters(said[0])
        assert body["seed"] == 2
    assert f"small, {DEMO.stat().st_size / 1e6:.3g} MB" in someone.page.locator(".named").first.text_content()
    heads = someone.page.locator("#heads .named").all_text_contents()
    assert "original" not in "".join(heads)  # which nobody has said that it is
    assert heads[1].startswith("large")
    ours, original = (someone.answers(role).nth(1).bounding_box() for role in ("optimised", "large"))
    assert ours["y"] == original["y"]
    assert ours["x"] + ours["width"] < original["x"]
    assert someone.complaints == []


@in_browser
def test_on_a_phone_the_answers_stand_one_below_the_other_and_nothing_is_wider_than_the_screen(visit, address):
    someone = visit(address, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    someone.setting("Longest answer", 40)
    someone.ask("Write a Python function that adds two numbers, with comments.")
    ours, original = (someone.answers(role).bounding_box() for role in ("optimised", "large"))
    assert ours["y"] + ours["height"] <= original["y"]
    for box in (ours, original):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    assert someone.page.evaluate("document.documentElement.scrollWidth") == 390
    assert someone.page.evaluate("document.getElementById('log').scrollWidth") <= 390


@in_browser
def test_a_server_that_dies_loses_no_conversation(visit, files_to_compare, tmp_path):
    port = free_port()
    with served(files_to_compare[0], "--threads", 1, port=port, cache=tmp_path) as address:
        someone = visit(address)
        someone.setting("Longest answer", 12)
        someone.ask(QUESTION)
    (first,) = someone.said()
    someone.ask("And of Italy?")
    assert "The server cannot be reached." in someone.page.locator(".trouble").inner_text()
    assert someone.said() == [first, ""]
    with served(files_to_compare[0], "--threads", 1, port=port, cache=tmp_path):
        someone.page.get_by_role("button", name="Try again").click()
        someone.rest()
        assert someone.page.locator(".trouble").count() == 0
        assert someone.said()[0] == first
        assert someone.said()[1]


@in_browser
def test_a_server_with_a_key_is_asked_with_the_key(visit, files_to_compare, tmp_path):
    arguments = (files_to_compare[0], "--threads", 1, "--api-key", "open sesame")
    with served(*arguments, port=free_port(), cache=tmp_path) as address:
        someone = visit(address)
        someone.page.get_by_label("API key").fill("wrong")
        someone.page.keyboard.press("Enter")
        someone.page.get_by_text("The last key was not accepted.").wait_for()
        someone.page.get_by_label("API key").fill("open sesame")
        someone.page.keyboard.press("Enter")
        someone.page.get_by_role("heading", name="small", exact=True).wait_for()
        someone.setting("Longest answer", 8)
        someone.ask(QUESTION)
        assert someone.said()[0]


@in_browser
def test_a_refused_question_says_why(visit, address):
    someone = visit(address)
    someone.single()
    someone.ask("word " * 6000)  # longer than the context
    trouble = someone.page.locator(".trouble").inner_text()
    assert re.search("context|longer|exceed", trouble)


def stream(*events):
    """A stand-in for what this server does not do on demand."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return {"status": 200, "content_type": "text/event-stream", "body": "".join(lines) + "data: [DONE]\n\n"}


def delta(text):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


@in_browser
def test_hostile_words_are_shown_and_not_obeyed(visit, address):
    script = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    hostile = f"{script}\n```html\n</code></pre><b>bold</b>\n```\n- **<i>x</i>**"
    someone = visit(address)
    someone.single()
    someone.page.on("dialog", lambda dialog: pytest.fail("the answer was obeyed"))
    someone.page.route("**/chat/completions", lambda route: route.fulfill(**stream(delta(hostile))))
    someone.ask("<b>me too</b>")
    answer = someone.answers()
    assert answer.locator("img, script, b, i").count() == 0
    assert answer.locator("p").inner_text() == script
    assert answer.locator("pre code").inner_text() == "</code></pre><b>bold</b>\n"
    assert answer.locator("li strong").inner_text() == "<i>x</i>"
    assert someone.page.get_by_role("heading", name="<b>me too</b>").is_visible()


@in_browser
@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ({"status": 429, "json": {"error": {"message": "full"}}}, "The server is busy"),
        ({"status": 500, "body": "oops"}, "The server failed: status 500"),
        ({"status": 400, "json": {"error": {"message": "Seeds are positive"}}}, "Seeds are positive"),
        (stream(delta("Well"), {"error": {"message": "out of memory"}}), "out of memory"),
        ({"status": 200, "content_type": "text/event-stream", "body": "data: {}\n\n"}, "The connection ended"),
    ],
    ids=["busy", "failed", "refused", "broken", "cut off"],
)
def test_trouble_is_a_sentence_and_a_way_on(visit, address, reply, sentence):
    someone = visit(address)
    someone.single()
    someone.setting("Longest answer", 8)
    someone.page.route("**/chat/completions", lambda route: route.fulfill(**reply))
    someone.ask(QUESTION)
    assert sentence in someone.page.locator(".trouble").inner_text()
    someone.page.unroute("**/chat/completions")
    someone.page.get_by_role("button", name="Try again").click()
    someone.rest()
    assert someone.page.locator(".trouble").count() == 0
    assert someone.said()[0]


@in_browser
def test_shift_enter_starts_a_new_line_and_what_is_typed_meanwhile_is_kept(visit, address):
    someone = visit(address)
    someone.single()
    someone.setting("Longest answer", 20)
    keyboard, held = someone.page.keyboard, []
    someone.page.route("**/chat/completions", lambda route: held.append(route))  # the answer waits for the typing
    someone.page.get_by_label("Your message").click()
    keyboard.type("Count to twenty.")
    keyboard.press("Shift+Enter")
    keyboard.type("In words.")
    someone.page.locator("#send:enabled").wait_for()
    keyboard.press("Enter")
    keyboard.type("And then?")
    keyboard.press("Enter")  # too early: the answer is still being written
    someone.page.get_by_role("button", name="Stop").wait_for()
    held.pop().continue_()
    someone.rest()
    assert held == []
    assert [body["messages"][-1]["content"] for body in someone.bodies()] == ["Count to twenty.\nIn words."]
    assert someone.page.get_by_label("Your message").input_value() == "And then?"


@in_browser
def test_the_mark_of_an_answer_from_elsewhere(visit, address):
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    end["pocketlm"] = {"answered_by": "a-larger-model", "confidence": 0.412}
    someone = visit(address)
    someone.single()
    someone.page.route("**/chat/completions", lambda route: route.fulfill(**stream(delta("Paris"), end)))
    someone.ask(QUESTION)
    line = someone.answers().locator(".figures").inner_text()
    assert "answered by a-larger-model" in line
    assert "0.41" in line
