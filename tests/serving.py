"""What tests of pages share: a browser, a saved tiny model, a folder of pictures, a server on a free port."""

import base64
import http.client
import io
import json
import threading
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextblock.checkpoint import save_model
from nextblock.config import DataConfig
from nextblock.look.settings import ServeSettings
from nextblock.serve.server import Server
from nextblock.serve.session import Session
from toy import tiny_model

DATA = DataConfig(val_resize_px=16, workers=0)


@pytest.fixture(scope="module", name="browser")
def browser_fixture():
    """Chromium; without it a test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=args)
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(name="page")
def page_fixture(browser):
    """A narrow page; it may ask no other host, and nothing may go wrong in it."""
    page, wrong = browser.new_page(viewport={"width": 400, "height": 800}), []

    def look(request) -> None:
        wrong.extend([] if request.url.startswith(("file:", "data:", "http://127.")) else [request.url])

    page.on("request", look)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    yield page
    page.close()
    # The browser itself tells of a refused question.
    assert [text for text in wrong if "status of 400" not in text] == []


def save_tiny(folder, model=None):
    """The path of a saved model of 16 x 24 px, 2 x 3 blocks; and of a folder of nine pictures."""
    save_model(folder / "model.safetensors", model or tiny_model(), data=DATA)
    rng = np.random.default_rng(1)
    for number in range(9):
        path = folder / "pictures" / "ab"[number // 5] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
    return str(folder / "model.safetensors"), str(folder / "pictures")


@contextmanager
def served(*, is_indexed=True, **settings):
    """A server that has encoded its images, if wanted."""
    settings = ServeSettings(port=0, device="cpu", **settings)
    with Server(settings.host, settings.port) as server:
        server.session = Session(settings)
        if is_indexed:
            server.session.index()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method, path, body=None, **headers) -> tuple[int, Any]:
    """Status and content of an answer: JSON, or bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    assert b"Traceback" not in content
    policy = "default-src 'self' 'unsafe-inline' data: blob:"
    assert answer.headers["Content-Security-Policy"].startswith(policy)
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(content) if is_json else content


def call(server, name, **values):
    """The answer to a question that is answered."""
    status, found = ask(server, "POST", f"/api/{name}", values)
    assert status == 200, found
    return found


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(url):
    """What a picture in JSON shows, (h w 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))
