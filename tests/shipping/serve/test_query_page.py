"""The page in a real browser: typing, clicks, keys, pictures; what it asks for, and says."""

import base64
import dataclasses
import io
import itertools
import json
import pathlib
import re

import chromium
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.find() is None, reason="there is no Chromium on this machine"),
]

PIL = pytest.importorskip("PIL.Image", reason='needs the extra "vision"')
pytest.importorskip("skimage", reason='needs the extra "vision"')

RANKED = (
    "!document.querySelector('#results').hidden && !document.querySelector('#rank').disabled"
    " && document.querySelector('#results').getAttribute('aria-busy') == 'false'"
)

# The lowest contrast of text on what is behind it, as WCAG has it, and the text.
CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType == 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest("noscript, option")) continue;
    let behind = e, ground;
    do { ground = parse(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
    while (behind && ground[3] === 0);
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.textContent.trim().slice(0, 40)];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.started(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser, products):
    """The page, ready; at the end it must have asked nobody else, and complained of nothing."""
    origin = f"http://127.0.0.1:{products.port}/"
    page = browser.page(origin)
    page.until("!document.querySelector('#model').hidden")
    yield page
    assert page.requests[0] == origin
    assert {url.partition(":")[0] for url in page.requests} <= {"http", "data", "blob"}
    for url in page.requests:
        assert not url.startswith("http") or url.startswith(origin), url
    assert page.complaints == []


def ranked(page, what="labels"):
    return page.value(
        f"[...document.querySelectorAll('#{what} > li')].map((row) => ["
        "row.querySelector('.what').firstChild.textContent,"
        "row.querySelector('.score').lastChild.textContent])"
    )


def test_typing_and_enter_rank_as_the_api_does(page, products):
    assert page.value("document.activeElement.id") == "text"
    assert page.value("document.title") == "products · label ranking"
    page.type("puzzle")
    page.press("Enter")
    page.until(RANKED)
    body = {"queries": [{"text": "puzzle"}], "k": 10}
    labels = products.post("/v1/predict", body)[1]["results"][0]["labels"]
    found = ranked(page)
    assert [text for text, _ in found] == [label["text"] for label in labels]
    for (_, shown), label in zip(found, labels):
        assert float(shown) == pytest.approx(label["score"], rel=0.05)
    documents = products.post("/v1/neighbours", body)[1]["results"][0]["documents"]
    assert [text for text, _ in ranked(page, "documents")] == [x["text"] for x in documents]
    said = page.value("document.querySelector('[aria-live]').textContent")
    assert re.fullmatch(r"10 labels and 10 documents in \d+ ms", said)
    # Bars of mixed scores are shares of the best.
    widths = page.value(
        "[...document.querySelectorAll('#labels .bar')].map((b) => "
        "b.firstChild.getBoundingClientRect().width / b.getBoundingClientRect().width)"
    )
    best = labels[0]["score"]
    assert widths == pytest.approx([label["score"] / best for label in labels], abs=0.01)
    # Pictures are those of the labels that have one, loaded, and named.
    page.until("[...document.images].every((image) => image.complete)")
    shown = page.value(
        "[...document.querySelectorAll('#labels img')].map((i) => [i.alt, i.naturalWidth > 0])"
    )
    assert shown == [[f"Picture of label {x['id']}", True] for x in labels if x["image"]]
    assert shown


def test_training_documents_that_are_not_shown_are_not_asked_for(products, browser, monkeypatch):
    config = dataclasses.replace(products.service.config, show_documents=False)
    monkeypatch.setattr(products.service, "config", config)
    page = browser.page(f"http://127.0.0.1:{products.port}/")
    page.until("!document.querySelector('#model').hidden")
    page.type("puzzle")
    page.press("Enter")
    page.until(RANKED)
    assert len(ranked(page)) == 10
    assert page.value("document.querySelector('#near').hidden")
    assert not [url for url in page.requests if "neighbours" in url]
    assert page.complaints == []


def test_what_labels_say_is_never_html(page, products):
    odd = products.predictor.artifact.labels.texts[0]
    assert odd.startswith("<img")
    page.type(odd)
    page.press("Enter")
    page.until(RANKED)
    assert odd in [text for text, _ in ranked(page)]
    assert page.value("document.querySelectorAll('.what img, .what b').length") == 0


def test_keys_alone(page):
    """Tab goes from the text to pictures, ranking, count and button; arrows choose a ranking."""
    page.type("soft towel")
    order = []
    for _ in range(4):
        page.press("Tab")
        order.append(page.value("document.activeElement.id"))
        if order[-1] == "augmented":
            page.press("ArrowRight")
            assert page.value("document.querySelector('#plain').checked")
    assert order == ["files", "augmented", "k", "rank"]
    ring = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.value(ring) == "solid"
    page.press("Enter")
    page.until(RANKED)
    assert page.value("new URLSearchParams(location.hash.slice(1)).get('ranking')") == "plain"
    assert len(ranked(page)) == 10


def test_clicks_choose_ranking_and_count(page, products):
    page.click("#examples button")
    page.until(RANKED)
    text = page.value("document.querySelector('#text').value")
    assert text in list(products.predictor.artifact.documents.texts)
    mixed = ranked(page)
    page.click("label[for=plain]")
    page.until(RANKED)
    body = {"queries": [{"text": text}], "k": 10, "ranking": "plain"}
    labels = products.post("/v1/predict", body)[1]["results"][0]["labels"]
    assert [name for name, _ in ranked(page)] == [label["text"] for label in labels]
    assert ranked(page) != mixed
    page.value("document.querySelector('#k').value = '3'")
    page.click("#rank")
    page.until("document.querySelectorAll('#labels > li').length == 3")
    # The address holds the query: another tab shows the same.
    address = page.value("location.href")
    page.go("about:blank#")
    page.go(address)
    page.until(RANKED)
    assert page.value("document.querySelector('#plain').checked") and len(ranked(page)) == 3


def test_pictures_of_the_query(page, products, tmp_path):
    files = []
    for number, colour in enumerate([(200, 30, 30), (20, 60, 200), (0, 0, 0)]):
        files.append(tmp_path / f"{number}.png")
        PIL.new("RGB", (40, 30), colour).save(files[-1])
    page.type("toy")
    page.press("Enter")
    page.until(RANKED)
    without = ranked(page)
    page.upload("#files", files)
    page.until("document.querySelectorAll('#pictures img').length == 2")
    alert = page.value("document.querySelector('[role=alert]').textContent")
    assert alert == "A document has at most 2 pictures here."
    page.click("#rank")
    page.until(RANKED)
    images = [base64.b64encode(file.read_bytes()).decode() for file in files[:2]]
    body = {"queries": [{"text": "toy", "images": images}], "k": 10}
    labels = products.post("/v1/predict", body)[1]["results"][0]["labels"]
    assert [text for text, _ in ranked(page)] == [label["text"] for label in labels]
    assert ranked(page) != without
    names = page.value("[...document.querySelectorAll('#pictures button')].map((b) => b.ariaLabel)")
    assert names == ["Remove 0.png", "Remove 1.png"]
    page.click("#pictures button")
    page.until("document.querySelectorAll('#pictures img').length == 1")
    assert page.value("document.activeElement.id") == "files"


def test_what_goes_wrong_is_said(page, tmp_path):
    page.press("Enter")
    page.until("!document.querySelector('[role=alert]').hidden")
    alert = "document.querySelector('[role=alert]').textContent"
    assert page.value(alert) == "Give a text or a picture."
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.upload("#files", [tmp_path / "no.png"])
    page.until("document.querySelectorAll('#pictures img').length == 1")
    page.click("#rank")
    page.until(f"{alert}.startsWith('Picture 1: expected one of JPEG, PNG')")
    assert not page.value("document.querySelector('#rank').disabled")
    # The browser says, too, that it was refused.
    assert all("422" in said for said in page.complaints) and page.complaints
    page.complaints.clear()


def test_a_model_that_is_loading_is_waited_for(browser, products, monkeypatch):
    batcher = products.service._batcher
    monkeypatch.setattr(products.service, "_batcher", None)
    page = browser.page(f"http://127.0.0.1:{products.port}/")
    page.until("document.querySelector('#status').textContent == 'The model is being loaded …'")
    monkeypatch.setattr(products.service, "_batcher", batcher)
    page.until("document.querySelector('#status').textContent == ''")
    page.until("!document.querySelector('#model').hidden")


def test_what_assistive_technology_is_told(page):
    page.type("puzzle")
    page.press("Enter")
    page.until(RANKED)
    page.click("#model summary")
    tree = page.tree()
    for node in tree:
        if node["role"] in ("textbox", "button", "radio", "spinbutton", "image", "region"):
            assert node["name"], node
    by_role = {}
    for node in tree:
        by_role.setdefault(node["role"], []).append(node["name"])
    assert by_role["textbox"] == ["Document"]
    assert by_role["radio"] == ["Augmented", "Plain"]
    assert by_role["spinbutton"] == ["Show"] and "Ranking" in by_role["group"]
    assert {"Rank"} <= set(by_role["button"])
    assert by_role["heading"] == ["products", "Labels", "Documents near it"]
    assert len(by_role["main"]) == len(by_role["banner"]) == len(by_role["contentinfo"]) == 1
    assert len(by_role["list"]) >= 2 and len(by_role["listitem"]) >= 20
    assert by_role["status"] and by_role["table"]
    levels = page.value("[...document.querySelectorAll('h1, h2, h3')].map((h) => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.value("document.documentElement.lang") == "en"
    ids = page.value("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.value("[...document.querySelectorAll('label[for]')].every((l) => l.control)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page, scheme):
    page.prefer(color_scheme=scheme)
    page.type("puzzle")
    assert page.value(CONTRAST)[0] >= 4.5, page.value(CONTRAST)
    page.press("Enter")
    page.until(RANKED)
    page.click("#model summary")
    page.value("document.querySelector('.results').style.transition = 'none'")
    assert page.value(CONTRAST)[0] >= 4.5, page.value(CONTRAST)
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", ground)[:3])) < 380
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 1000])
def test_nothing_is_wider_than_the_window(page, width, tmp_path):
    page.size(width, 800)
    page.type("puzzle " + "x" * 120)
    page.press("Enter")
    page.until(RANKED)
    page.click("#model summary")
    assert page.value("document.documentElement.scrollWidth") <= width
    tops = page.value(
        "[...document.querySelectorAll('.results section')]"
        ".map((section) => section.getBoundingClientRect().top)"
    )
    assert (tops[0] == tops[1]) == (width >= 1000)  # beside each other, or below
    page.screenshot(tmp_path / "page.png")
    assert PIL.open(io.BytesIO((tmp_path / "page.png").read_bytes())).width == width


def test_nothing_moves_for_those_who_asked_for_it(page):
    page.prefer(reduced_motion="reduce")
    moving = (
        "[...document.querySelectorAll('*')].filter((e) => {const s = getComputedStyle(e);"
        "return parseFloat(s.transitionDuration) || parseFloat(s.animationDuration)}).length"
    )
    assert page.value(moving) == 0


def test_the_policy_keeps_the_page_to_itself(browser, products):
    page = browser.page(f"http://127.0.0.1:{products.port}/")
    page.until("!document.querySelector('#model').hidden")
    tried = "fetch('http://127.0.0.1:1/').then(() => 'sent', (error) => error.name)"
    assert page.value(tried) == "TypeError"
    image = "<img src=http://127.0.0.1:1/x.png onerror='window.ran = 1'>"
    page.value(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(image)})")
    page.until("document.images[document.images.length - 1].complete")
    assert page.value("window.ran === undefined")
    assert any("Content Security Policy" in said for said in page.complaints)


def test_the_files_are_small_and_name_nobody_else():
    static = (
        pathlib.Path(chromium.__file__).parents[1] / "xmc_jax" / "shipping" / "serve" / "static"
    )
    for file in static.iterdir():
        text = file.read_text()
        assert len(text) < 40_000
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert "innerHTML" not in text and "eval(" not in text
