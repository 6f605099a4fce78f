"""The page in a browser: an image goes up, every card answers, a clicked block changes the completion."""

import numpy as np
import pytest

from serving import browser, png, save_tiny, served  # noqa: F401 - a fixture
from toy import one_thread, toy_model  # noqa: F401 - a fixture

READY = "#cards:not([hidden]):not(:has(.busy))"


@pytest.fixture
def page(browser):  # noqa: F811
    page, said = browser.new_page(viewport={"width": 400, "height": 800}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: said.extend([request.url] * (not request.url.startswith(("http://127.", "data:")))),
    )
    yield page
    page.close()
    # The browser itself tells of a refused question; nothing else was said, and nobody else was asked.
    assert [text for text in said if "status of 400" not in text] == []


def upload(page):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    page.set_input_files("#file", {"name": "noise.png", "mimeType": "image/png", "buffer": png(pixels)})
    page.wait_for_selector(READY)


def test_an_image_is_shown_with_all_that_the_model_makes_of_it(page, tmp_path):
    path, data = save_tiny(tmp_path)
    with served(model=path, data=data) as server:
        page.goto(server.url)
        upload(page)
        assert page.locator(".card .error:not(:empty)").count() == 0
        assert page.locator("#predict dt").all_inner_texts()[0] == "loss of the model"
        assert (
            page.locator("#surprise .grid span").count()
            == page.locator("#complete button[aria-pressed]").count()
            == 6
        )
        assert page.locator("#nearest .thumbs button").count() == 9
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        # A block is taken away with a click, and given again with the keyboard.
        completed = page.locator("#complete img.out")
        first, block = completed.get_attribute("src"), page.get_by_label("row 1, column 3")
        assert block.get_attribute("aria-pressed") == "true"
        with page.expect_response("**/api/complete"):
            block.click()
        page.wait_for_selector(READY)
        assert block.get_attribute("aria-pressed") == "false"
        assert completed.get_attribute("src") != first
        page.get_by_label("row 1, column 2").focus()
        with page.expect_response("**/api/complete"):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
        page.wait_for_selector(READY)
        assert completed.get_attribute("src") == first
        # A picture of --data is looked at next.
        with page.expect_response("**/api/predict"):
            page.locator("#nearest .thumbs button").first.click()
        page.wait_for_selector(READY)
        assert page.locator("#nearest .thumbs button").count() == 8


def test_what_an_encoder_alone_cannot_do_is_said_where_it_would_be(page, tmp_path):
    path, data = save_tiny(tmp_path, toy_model())
    with served(model=path, data=data) as server:
        page.goto(server.url)
        upload(page)
        for card in ("predict", "complete", "surprise"):
            page.locator(f"#{card} .error").filter(has_text="encoder alone").wait_for()
            assert not page.locator(f"#{card} .body").is_visible()
        page.locator("#features .out").wait_for()
        page.locator("#nearest .thumbs button").nth(8).wait_for()


def test_a_file_that_is_no_image_or_too_large_is_refused_in_a_sentence(page, tmp_path):
    path, _ = save_tiny(tmp_path)
    with served(model=path, max_upload_mb=0.01) as server:
        page.goto(server.url)
        for content, why in (
            (b"<b>no picture</b>", "cannot be read as an image"),
            (b"x" * 20_000, "larger than 0.01 MB"),
        ):
            page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": content})
            page.get_by_role("alert").filter(has_text=why).wait_for()
