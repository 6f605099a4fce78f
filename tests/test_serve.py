"""The served page: who may ask, what is refused, that answers are those of the library; and in a browser."""

import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from einops import rearrange

import nextblock
from nextblock.data import normalize
from nextblock.data.augment import val_crop
from nextblock.look.surprise import block_surprise
from nextblock.models.completion import complete
from nextblock.serve import session as session_module
from nextblock.serve.session import Session
from serving import DATA, ask, browser_fixture, call, page_fixture, pixels_of, png, save_tiny, served  # noqa: F401
from tiny_runs import call_cli, contents, refused, run_toy, write_images
from toy import tiny_model, toy_model

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(paths):
    with served(model=paths[0], data=paths[1], max_upload_mb=0.1) as server:
        yield server


@pytest.fixture
def kept(server):
    status, found = ask(server, "POST", "/api/upload", png(NOISE))
    assert status == 200
    return found["image"]


FOREIGN = {
    "Host": ["evil.example:PORT", "127.0.0.1.evil.example:PORT", "127.0.0.1:1", "127.0.0.1", "", "[::1"],
    "Origin": ["http://evil.example", "null", "https://127.0.0.1:PORT", "http://localhost:1"],
    "Sec_Fetch_Site": ["cross-site", "same-site"],
}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        *(({name: value}, 403) for name, values in FOREIGN.items() for value in values),
    ],
)
def test_only_the_page_itself_may_ask(server, headers, status):
    headers = {name: value.replace("PORT", str(server.server_port)) for name, value in headers.items()}
    assert ask(server, "GET", "/api/about", **headers)[0] == status
    assert ask(server, "POST", "/api/nearest", {"image": 99}, **headers)[0] == (400 if status == 200 else 403)


def test_a_link_of_another_page_opens_the_page_but_reads_nothing(server):
    headers = {"Sec_Fetch_Site": "cross-site"}
    assert ask(server, "GET", "/", **headers)[0] == 200
    assert ask(server, "GET", "/", **headers, Origin="http://evil.example")[0] == 403
    assert ask(server, "GET", "/api/thumbnail?index=0", **headers)[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/api/upload", b"x" * 150_000, 413, "larger than 0.1 MB"),
        ("POST", "/api/upload", b"x" * 700_000, 413, "--max_upload_mb"),
        ("POST", "/api/predict", b"x" * 1_100_000, 413, "larger"),
        ("POST", "/api/upload", b"this is no picture", 400, "cannot be read as an image"),
        ("POST", "/api/upload", png(NOISE)[:200], 400, "truncated"),
        ("POST", "/api/upload", b"", 400, "empty"),
        ("POST", "/api/predict", b"{", 400, "predict needs image"),
        ("POST", "/api/predict", [1], 400, "predict needs image"),
        ("POST", "/api/predict", {"image": 0, "model": "/etc/passwd"}, 400, "predict needs image"),
        ("POST", "/api/predict", {"image": 12345}, 400, "no longer kept"),
        ("POST", "/api/predict", {"image": "../../x"}, 400, "whole number"),
        ("POST", "/api/choose", {"index": -1}, 400, "whole number"),
        ("POST", "/api/choose", {"index": 9}, 400, "below 9"),
        ("GET", "/api/thumbnail?index=../a/0.png", None, 400, "whole number"),
        ("GET", "/api/thumbnail", None, 400, "thumbnail needs index"),
        ("GET", "/api/picture?step=0", None, 400, "not a run"),
        ("GET", "/run", None, 400, "not a run"),
        ("GET", "/api/upload", None, 404, "nothing here"),
        ("POST", "/api/about", {}, 404, "nothing here"),
        ("GET", "/api/__init__", None, 404, "nothing here"),
        ("GET", "/../server.py", None, 404, "nothing here"),
        ("GET", "/page.html", None, 404, "nothing here"),
    ],
)
def test_a_wrong_request_is_answered_by_a_sentence(server, method, path, body, status, words):
    found, content = ask(server, method, path, body)
    assert (found, set(content)) == (status, {"error"})
    assert words in content["error"]


def test_a_body_without_a_length_is_refused(server):
    status, found = ask(server, "POST", "/api/upload", Transfer_Encoding="chunked")
    assert (status, found["error"]) == (411, "The request does not state its length.")


def test_an_unforeseen_error_tells_the_page_only_its_kind(server, kept, monkeypatch, caplog):
    monkeypatch.setattr(session_module, "block_surprise", Mock(side_effect=OSError("/home/user/secret.png")))
    status, found = ask(server, "POST", "/api/surprise", {"image": kept})
    assert (status, found["error"]) == (500, "This failed (OSError); the terminal says more.")
    assert "secret" in caplog.text


def test_more_pixels_than_the_decoder_allows_are_refused(server, monkeypatch):
    monkeypatch.setattr(server.session, "data", replace(DATA, max_pixels=599))
    status, found = ask(server, "POST", "/api/upload", png(NOISE))
    assert status == 400
    assert "more than data.max_pixels (599)" in found["error"]


def test_the_oldest_images_are_dropped(server, kept, monkeypatch):
    monkeypatch.setattr(session_module, "KEPT_IMAGES", len(server.session.images))
    oldest = min(server.session.images)
    call(server, "choose", index=0)
    assert oldest not in server.session.images
    assert "no longer kept" in ask(server, "POST", "/api/features", {"image": oldest})[1]["error"]


def seen(pixels=NOISE):
    """The crop of the picture that was sent, and as the model takes it."""
    crop = val_crop(rearrange(torch.from_numpy(pixels), "h w c -> c h w"), (16, 24), DATA)
    return crop, normalize(crop[None], DATA.mean, DATA.std)


def shown(images):
    """Normalised images as bytes, (h w 3)."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (DATA.mean, DATA.std))
    return rearrange((images[0] * std + mean).clamp(0, 1).mul(255).round().byte(), "c h w -> h w c").numpy()


def test_about_and_the_kept_image_are_those_of_the_model(server, paths):
    found = ask(server, "GET", "/api/about")[1]
    assert (found["image_size"], found["block_grid"], found["no_prediction"]) == ([16, 24], [2, 3], "")
    assert found["data"] == {"spec": paths[1], "images": 9}
    assert (found["is_run"], found["step"]) == (False, None)
    picture = ask(server, "POST", "/api/upload", png(NOISE))[1]["picture"]
    assert (pixels_of(picture) == rearrange(seen()[0], "c h w -> h w c").numpy()).all()


def test_predictions_are_those_of_predict(server, paths, tmp_path):
    image = {"data": f"{paths[1]}/b/8.png", "out": str(tmp_path)}
    (row,) = nextblock.predict(model=paths[0], **image, device="cpu", workers=0).rows
    found = call(server, "predict", image=call(server, "choose", index=8)["image"])
    losses = [found["loss"], *found["references"].values()]
    assert losses == pytest.approx([*row.values()][1:], rel=1e-6)
    assert found["words"][0] == "Loss: squared error of block-normalised pixels."
    assert pixels_of(found["picture"]).shape == (16, 24, 3)


@pytest.mark.parametrize("given", ["111000", "100000", "010101", "111111"])
def test_completions_and_surprise_are_those_of_the_library(server, kept, given):
    _, images = seen()
    blocks = [one == "1" for one in given]
    completed = images if all(blocks) else complete(tiny_model(), images, torch.tensor(blocks)).images
    found = call(server, "complete", image=kept, given=blocks)
    assert (pixels_of(found["picture"]) == shown(completed)).all()
    losses = block_surprise(tiny_model(), images)[0].tolist()
    assert call(server, "surprise", image=kept)["losses"] == [None, *map(pytest.approx, losses[1:])]


def test_blocks_that_are_not_the_models_are_refused(server, kept):
    for given in ([True] * 5, [1] * 6, "111000", None):
        status, found = ask(server, "POST", "/api/complete", {"image": kept, "given": given})
        assert (status, found["error"]) == (400, "given must be true or false for each of the 6 blocks")


def test_the_nearest_are_those_of_search_and_the_image_itself_is_left_out(server, paths):
    query = f"{paths[1]}/b/8.png"
    rows = nextblock.search(model=paths[0], data=paths[1], query=query, top=4, device="cpu", workers=0).rows
    wanted = [(row["name"], row["class"]) for row in rows if not row["is_query"]]
    image = call(server, "choose", index=8)["image"]
    found = call(server, "nearest", image=image)
    assert [(row["name"], row["class"]) for row in found["rows"][:4]] == wanted
    assert found["rows"][0]["similarity"] == pytest.approx(rows[-4]["similarity"], abs=1e-6)
    assert (found["searched"], found["images"], found["is_done"]) == (9, 9, True)
    status, thumbnail = ask(server, "GET", "/api/thumbnail?index=8")
    assert status == 200
    assert thumbnail.startswith(b"\x89PNG")


def test_images_are_searched_though_many_others_cannot_be_read(paths, tmp_path):
    write_images(tmp_path, 4, broken=4)
    with served(model=paths[0], data=str(tmp_path)) as server:
        found = call(server, "nearest", image=call(server, "choose", index=0)["image"])
    assert (len(found["rows"]), found["searched"], found["is_done"]) == (3, 4, True)


def test_before_the_first_batch_is_encoded_nothing_is_found_yet(paths):
    with served(model=paths[0], data=paths[1], is_indexed=False) as server:
        image = call(server, "choose", index=0)["image"]
        wanted = {"rows": [], "searched": 0, "images": 9, "is_done": False}
        assert call(server, "nearest", image=image) == wanted
        server.session.index()
        assert len(call(server, "nearest", image=image)["rows"]) == 8


def test_without_data_the_rest_works(paths):
    with served(model=paths[0]) as server:
        image = ask(server, "POST", "/api/upload", png(NOISE))[1]["image"]
        assert "--data SOURCE" in ask(server, "POST", "/api/nearest", {"image": image})[1]["error"]
        assert pixels_of(call(server, "features", image=image)["picture"]).shape == (4, 6, 3)


def test_a_run_is_followed_and_nothing_is_written(tmp_path):
    run = tmp_path / "run"
    run_toy(run)
    drawn = run / "pictures" / "step_00000003.png"
    drawn.parent.mkdir()
    drawn.write_bytes(png(NOISE))
    before = contents(tmp_path)
    with served(model=str(run)) as server:
        about = ask(server, "GET", "/api/about")[1]
        assert (about["is_run"], about["step"], about["image_size"]) == (True, 7, [16, 16])
        assert ask(server, "POST", "/api/upload", png(NOISE))[0] == 200
        found = ask(server, "GET", "/api/run")[1]
        assert "step 7" in found["header"]
        assert found["values"]["charts"][0]["series"][0]["x"] == [*range(1, 8)]
        assert found["values"]["pictures"] == [{"step": 3, "src": "/api/picture?step=3"}]
        assert ask(server, "GET", "/api/picture?step=3")[1] == drawn.read_bytes()
        assert "no picture of step 5" in ask(server, "GET", "/api/picture?step=5")[1]["error"]
        assert b"nextblock" in ask(server, "GET", "/run")[1]
    assert contents(tmp_path) == before
    shutil.rmtree(run / "checkpoints" / "step_00000007")
    with served(model=str(run)) as server:
        assert ask(server, "GET", "/api/about")[1]["image_size"] is None
        assert "no checkpoint yet" in ask(server, "POST", "/api/upload", png(NOISE))[1]["error"]
        assert ask(server, "GET", "/run")[0] == 200


def test_the_command_tells_its_address_ends_at_ctrl_c_and_names_a_port_in_use(
    paths, capsys, server, monkeypatch
):
    monkeypatch.setattr(Session, "index", Mock(side_effect=KeyboardInterrupt))  # once the page is up
    code, out, err = call_cli(capsys, "serve", paths[0], "--port", "0", "--device", "cpu", "--json")
    assert (code, err) == (130, "nextblock serve: interrupted\n")
    assert "Open http://127.0.0.1:" in out
    told = call_cli(capsys, "serve", paths[0], "--port", server.server_port)
    assert "choose another --port" in refused(told)


READY = "#cards:not([hidden]):not(:has(.busy))"


def upload(page, server):
    page.goto(server.url)
    page.set_input_files("#file", {"name": "noise.png", "mimeType": "image/png", "buffer": png(NOISE)})
    page.wait_for_selector(READY)


def test_an_image_is_shown_with_all_that_the_model_makes_of_it(page, tmp_path):
    path, data = save_tiny(tmp_path)
    with served(model=path, data=data) as server:
        upload(page, server)
        assert page.locator(".card .error:not(:empty)").count() == 0
        assert page.locator("#predict dt").all_inner_texts()[0] == "loss of the model"
        assert page.locator("#surprise .grid span").count() == 6
        assert page.locator("#complete button[aria-pressed]").count() == 6
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
        upload(page, server)
        for card in ("predict", "complete", "surprise"):
            page.locator(f"#{card} .error").filter(has_text="encoder alone").wait_for()
            assert not page.locator(f"#{card} .body").is_visible()
        page.locator("#features .out").wait_for()
        page.locator("#nearest .thumbs button").nth(8).wait_for()


def test_a_file_that_is_no_image_or_too_large_is_refused_in_a_sentence(page, tmp_path):
    path, _ = save_tiny(tmp_path)
    with served(model=path, max_upload_mb=0.01) as server:
        page.goto(server.url)
        refused = {b"<b>no picture</b>": "cannot be read as an image", b"x" * 20_000: "larger than 0.01 MB"}
        for content, why in refused.items():
            page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": content})
            page.get_by_role("alert").filter(has_text=why).wait_for()
