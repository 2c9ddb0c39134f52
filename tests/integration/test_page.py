"""The endpoint's page in a real Chromium: what an annotator does, from a photo to a dataset."""

import base64
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import TOKEN, serving

from samray.config import ServeConfig, load_config
from samray.data.dataset import PreparedDataset
from samray.data.prepare import prepare

SECONDS = 60
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make chromium` installs it"),
]


@pytest.fixture(scope="module")
def address(ray_cluster, tmp_path_factory):
    """`tiny`, behind a token."""
    token_file = tmp_path_factory.mktemp("token") / "token.txt"
    token_file.write_text(TOKEN)
    settings = ServeConfig(token_file=str(token_file), cpus_per_replica=0.2)
    with serving(settings) as url:
        yield f"{url}/"


@pytest.fixture
def page(address):
    """The page in a browser, the token given, and nothing logged as an error."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800}, accept_downloads=True)
        page.set_default_timeout(1000 * SECONDS)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        wait(page, "$('status').textContent.includes('token')")
        page.fill("#token", TOKEN)
        page.press("#token", "Tab")
        wait(page, "$('model').options.length > 0")
        yield page
        browser.close()
    assert not errors


def wait(page, condition):
    """Until JavaScript's condition holds; the page's own policy forbids Playwright's waiting."""
    deadline = time.monotonic() + SECONDS
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, (condition, page.text_content("#status"))
        page.wait_for_timeout(50)


def drop(page, photo):
    """Drop a file on the stage, as a person would from the desktop."""
    content = base64.b64encode(photo.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
            return transfer;
        }""",
        [content, photo.name],
    )
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    wait(page, "state.id !== null")


def screen(page, x, y):
    """Where a pixel of the image lies on the screen."""
    area = page.locator("#canvas").bounding_box()
    scale = area["width"] / page.evaluate("canvas.width")
    return area["x"] + (x + 0.5) * scale, area["y"] + (y + 0.5) * scale


def answered(page, condition="true"):
    wait(page, f"state.masks.length > 0 && ({condition})")


def download(page, kind):
    with page.expect_download() as waiting:
        page.click(f"[data-save={kind}]")
    return waiting.value


def answer_dialog(page, button, accept):
    """Press a button, and answer the question that comes of it."""
    seen = []

    def answer(dialog):
        seen.append(dialog.message)
        if accept:
            dialog.accept()
        else:
            dialog.dismiss()

    page.once("dialog", answer)
    page.click(button)
    deadline = time.monotonic() + 60
    while not seen:
        page.wait_for_timeout(50)
        assert time.monotonic() < deadline


def test_clicks_become_a_dataset(page, photos, tmp_path):
    photo = min((photos / "images").iterdir())
    drop(page, photo)

    # A click includes; three candidates, one of them chosen by its key; a shift-click excludes.
    page.mouse.click(*screen(page, 120, 80))
    answered(page, "state.masks.length === 3")
    page.keyboard.press("2")
    assert page.evaluate("state.chosen") == 1
    page.keyboard.down("Shift")
    page.mouse.click(*screen(page, 5, 5))
    page.keyboard.up("Shift")
    answered(page, "state.masks.length === 1")
    assert page.evaluate("state.labels") == [1, 0]
    clicked = page.evaluate("state.points")
    np.testing.assert_allclose(clicked, [[120, 80], [5, 5]], atol=1)
    page.keyboard.press("z")  # undo asks again, for the one point that is left
    answered(page, "state.points.length === 1 && state.masks.length === 3")
    page.fill("#label", "pebble")
    page.click("#finish")

    # A drag is a box.
    page.mouse.move(*screen(page, 40, 50))
    page.mouse.down()
    page.mouse.move(*screen(page, 150, 160), steps=5)
    page.mouse.up()
    answered(page, "state.box")
    np.testing.assert_allclose(page.evaluate("state.box"), [40, 50, 150, 160], atol=1)
    page.fill("#label", "leaf")
    page.click("#finish")
    assert page.locator("#objects li").count() == 2
    if folder := os.environ.get("SAMRAY_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/laptop.png")
        page.set_viewport_size({"width": 420, "height": 800})
        page.screenshot(path=f"{folder}/narrow.png", full_page=True)

    # What it downloads is a dataset, mask for mask.
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photo, data)
    saved = download(page, "labelme")
    assert saved.suggested_filename == f"{photo.stem}.json"
    saved.save_as(data / saved.suggested_filename)
    words = {"prepare.data_dir": str(data), "prepare.output_dir": str(tmp_path / "prepared")}
    # One photo cannot be split.
    words |= {"prepare.val_fraction": 0.0, "prepare.test_fraction": 0.0}
    manifest = prepare(load_config(options=words))
    assert manifest["num_instances"] == 2
    assert manifest["rejected"] == []
    (record,) = PreparedDataset(tmp_path / "prepared").images.values()
    boxes = page.evaluate("state.objects.map((object) => object.bbox)")
    shown = page.evaluate("state.objects.map((object) => Array.from(object.pixels))")
    for instance, (x1, y1, x2, y2), pixels in zip(record.instances, boxes, shown, strict=True):
        mask = np.zeros(record.size, dtype=bool)
        mask[y1:y2, x1:x2] = np.array(pixels, dtype=bool).reshape(y2 - y1, x2 - x1)
        np.testing.assert_array_equal(record.decode(instance), mask)

    coco = json.loads(Path(download(page, "coco").path()).read_text())
    assert [category["name"] for category in coco["categories"]] == ["pebble", "leaf"]
    assert [entry["area"] for entry in coco["annotations"]] == page.evaluate(
        "state.objects.map((object) => object.area)"
    )
    found = np.asarray(Image.open(download(page, "png").path()).convert("RGB"))
    expected = np.zeros(found.shape[:2], dtype=np.uint8)
    for number, instance in enumerate(record.instances, 1):
        expected[record.decode(instance)] = number
    np.testing.assert_array_equal(found, np.dstack([expected] * 3))

    # Finished work is not thrown away by opening another image, unless people say so.
    answer_dialog(page, "#sample", accept=False)
    assert page.locator("#objects li").count() == 2
    answer_dialog(page, "#sample", accept=True)
    wait(page, "state.name === 'drawn.png' && state.id !== null")
    assert page.locator("#objects li").count() == 0


def test_by_keyboard_alone(page):
    page.focus("#sample")
    page.keyboard.press("Enter")
    wait(page, "state.id !== null")
    page.focus("#canvas")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    answered(page)
    page.keyboard.press("Escape")
    assert page.evaluate("state.points.length + state.masks.length") == 0
    page.keyboard.press("Space")
    answered(page)
    page.keyboard.press("Enter")
    assert page.locator("#objects li").count() == 1
    page.locator("#objects button").press("Enter")
    assert page.locator("#objects li").count() == 0
