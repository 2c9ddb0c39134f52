"""The endpoint's page in a real Chromium: what an annotator does, from photos to a dataset."""

import base64
import contextlib
import io
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image, PngImagePlugin
from ports import free_port
from ray import serve
from serving import TOKEN, deploy, serving, wait_until_ready

from samray.config import ServeConfig, load_config
from samray.data.dataset import PreparedDataset
from samray.data.prepare import prepare
from samray.geometry.images import decode_image

ROOT = Path(__file__).parents[2]
SECONDS = 60
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SIZES = {  # width, height and device pixels per CSS pixel
    "laptop": (1366, 768, 1),
    "narrow": (420, 800, 1),
    "200_percent": (683, 384, 2),
}

YELLOW = """(() => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let found = 0;
    for (let i = 0; i < data.length; i += 4)
        if (data[i] === 240 && data[i + 1] === 228 && data[i + 2] === 66) found++;
    return found;
})()"""  # pixels of the preview's edge

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make chromium` installs it"),
]


@pytest.fixture(scope="module")
def endpoint(ray_cluster, tmp_path_factory):
    """`tiny`, behind a token: settings, and address without the last slash."""
    token_file = tmp_path_factory.mktemp("token") / "token.txt"
    token_file.write_text(TOKEN)
    settings = ServeConfig(
        token_file=str(token_file), cpus_per_replica=0.2, max_megapixels=20, port=free_port()
    )
    with serving(settings, port=settings.port) as url:
        yield settings, url


@pytest.fixture(scope="module")
def address(endpoint):
    """Of the page."""
    _, url = endpoint
    return f"{url}/"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(address, browser):
    """`open_page(size)` opens the page with the token; nothing may be logged as an error."""
    errors: list[str] = []
    with contextlib.ExitStack() as contexts:

        def open_one(size="laptop", **options):
            width, height, scale = SIZES[size]
            context = browser.new_context(
                viewport={"width": width, "height": height},
                device_scale_factor=scale,
                accept_downloads=True,
                **options,
            )
            contexts.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(1000 * SECONDS)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda m: errors.append(m.text) if "Policy" in m.text else None)
            page.goto(address)
            wait(page, "window.$ && $('status').textContent.includes('token')")
            page.fill("#token", TOKEN)
            page.press("#token", "Tab")
            wait(page, "$('model').options.length > 0")
            return page

        yield open_one
    assert not errors


@pytest.fixture
def page(open_page):
    return open_page()


def wait(page, condition):
    """Until JavaScript's condition holds; the page's own policy forbids Playwright's waiting."""
    deadline = time.monotonic() + SECONDS
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, (condition, page.text_content("#status"))
        page.wait_for_timeout(20)


def drop(page, *files):
    """Drop files on the stage, as a person would from the desktop; wait for the encoding."""
    content = [[base64.b64encode(file.read_bytes()).decode(), file.name] for file in files]
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [content, name] of files) {
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    wait(page, "state.id !== null")


def screen(page, x, y):
    """Where a pixel of the image lies on the screen."""
    area = page.locator("#canvas").bounding_box()
    scale = area["width"] / page.evaluate("canvas.width")
    return area["x"] + (x + 0.5) * scale, area["y"] + (y + 0.5) * scale


def answered(page, condition="true"):
    wait(page, f"state.masks.length > 0 && !state.waiting && ({condition})")


def click(page, x, y):
    page.mouse.click(*screen(page, x, y))
    answered(page)


def finish(page, label):
    page.fill("#label", label)
    page.click("#finish")


def status(page):
    return page.text_content("#status")


def download(page, kind):
    with page.expect_download() as waiting:
        page.click(f"[data-save={kind}]")
    return waiting.value


def shown_masks(page, size):
    """The pixels of the page's objects that have any: H x W bool each."""
    objects = page.evaluate(
        "state.objects.filter((o) => o.area).map((o) => [o.bbox, Array.from(o.pixels)])"
    )
    masks = []
    for (x1, y1, x2, y2), pixels in objects:
        mask = np.zeros(size, dtype=bool)
        mask[y1:y2, x1:x2] = np.array(pixels, dtype=bool).reshape(y2 - y1, x2 - x1)
        masks.append(mask)
    return masks


def prepared(data, output, **options):
    """What `samray prepare` makes of a folder: the dataset and its manifest."""
    words = {"prepare.data_dir": str(data), "prepare.output_dir": str(output)}
    words |= {"prepare.val_fraction": 0.0, "prepare.test_fraction": 0.0}
    words |= {f"prepare.{key}": value for key, value in options.items()}
    manifest = prepare(load_config(options=words))
    return PreparedDataset(output), manifest


def screenshot(page, name):
    if folder := os.environ.get("SAMRAY_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.fixture(scope="module")
def some(photos):
    """The images of `photos` and, under the same names, their LabelMe files."""
    images = sorted((photos / "images").iterdir())
    return [(path, photos / "annotations" / f"{path.stem}.json") for path in images]


def test_clicks_become_a_dataset(page, some, tmp_path):
    photo = some[0][0]
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
    page.keyboard.press("z")
    answered(page, "state.points.length === 1 && state.masks.length === 3")
    finish(page, "pebble")

    # A drag is a box.
    page.mouse.move(*screen(page, 40, 50))
    page.mouse.down()
    page.mouse.move(*screen(page, 150, 160), steps=5)
    page.mouse.up()
    answered(page, "state.box")
    np.testing.assert_allclose(page.evaluate("state.box"), [40, 50, 150, 160], atol=1)
    finish(page, "leaf")
    assert page.locator("#objects li").count() == 2

    # What it downloads is a dataset, mask for mask.
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photo, data)
    saved = download(page, "labelme")
    assert saved.suggested_filename == f"{photo.stem}.json"
    saved.save_as(data / saved.suggested_filename)
    document = json.loads((data / saved.suggested_filename).read_text())
    for shape in document["shapes"]:  # labelme 6.3.1 ends with a traceback on colours
        assert Image.open(io.BytesIO(base64.b64decode(shape["mask"]))).mode == "L"
    dataset, manifest = prepared(data, tmp_path / "prepared")
    assert manifest["num_instances"] == 2
    assert manifest["rejected"] == []
    (record,) = dataset.images.values()
    found = [record.decode(instance) for instance in record.instances]
    np.testing.assert_array_equal(found, shown_masks(page, record.size))

    coco = json.loads(Path(download(page, "coco").path()).read_text())
    assert [category["name"] for category in coco["categories"]] == ["pebble", "leaf"]
    assert [entry["area"] for entry in coco["annotations"]] == [mask.sum() for mask in found]
    label_map = Image.open(download(page, "png").path())
    assert label_map.mode == "L"
    expected = np.zeros(record.size, dtype=np.uint8)
    for number, mask in enumerate(found, 1):
        expected[mask] = number
    np.testing.assert_array_equal(label_map, expected)


def found(page):
    wait(page, "!state.finding && $('status').textContent.includes('found in')")
    return page.evaluate("state.objects.filter((o) => o.proposed).map((o) => o.mask.score)")


def test_all_objects_are_found_and_put_right(page, some, tmp_path):
    photo = some[0][0]
    drop(page, photo)
    click(page, 120, 80)
    finish(page, "pebble")
    page.click("#find")
    scores = found(page)
    assert len(scores) > 3
    assert scores == sorted(scores, reverse=True)
    assert page.locator("#objects li").count() == 1 + len(scores)
    screenshot(page, "found")

    # Undo, and again by the keyboard; a second time nothing is there twice.
    page.click("#undo")
    assert page.evaluate("state.objects.map((o) => o.label)") == ["pebble"]
    assert page.locator("#proposals").is_hidden()
    page.locator("#canvas").focus()
    for _ in range(2):
        page.evaluate("$('live').textContent = ''")
        page.keyboard.press("f")
        assert found(page) == scores

    # The slider hides the less sure ones, and a reload keeps what it hid.
    least = (scores[2] + scores[3]) / 2
    page.locator("#least").evaluate(
        """(slider, least) => {
            for (const value of [least - 0.01, least]) {
                slider.value = value;
                slider.dispatchEvent(new Event("input"));
            }
            slider.dispatchEvent(new Event("change"));
        }""",
        least,
    )
    shown = sum(score >= page.evaluate("state.least") for score in scores)
    assert page.locator("#objects li").count() == 1 + shown < 1 + len(scores)
    assert page.text_content("#keep") == f"Keep {shown}"
    page.click("#undo")  # one step for the whole drag
    assert page.locator("#objects li").count() == 1 + len(scores)
    page.locator("#least").fill(f"{least:.2f}")
    hidden = page.evaluate("state.hidden.length")
    assert hidden > 0
    page.reload()
    wait(page, "window.state && state.id !== null")
    assert page.evaluate("state.hidden.length") == hidden
    page.locator("#least").fill(page.get_attribute("#least", "min"))
    assert page.locator("#objects li").count() == 1 + len(scores)

    # One gets another label, one goes, one is corrected from its box, the rest is kept.
    name = page.locator("#objects li:nth-child(2) input")
    name.fill("leaf")
    name.press("Enter")
    wait(page, "state.objects.some((o) => o.label === 'leaf' && !o.proposed)")
    last = page.evaluate("state.objects.findLastIndex((o) => o.proposed)")
    page.click(f"#objects li:nth-child({last + 1}) button")
    assert page.locator("#objects li").count() == len(scores)
    first = page.evaluate("state.objects.findIndex((o) => o.proposed)")
    before = page.evaluate(f"state.objects[{first}].bbox")
    page.click(f"#objects li:nth-child({first + 1}) .pick")
    with page.expect_request("**/v1/predict") as asked:
        page.mouse.click(*screen(page, (before[0] + before[2]) / 2, (before[1] + before[3]) / 2))
    (prompt,) = asked.value.post_data_json["prompts"]
    assert prompt["box"] == before
    answered(page)
    page.keyboard.press("Enter")
    wait(page, f"!state.objects[{first}].proposed && state.base === null")
    page.click("#keep")
    assert page.evaluate("state.objects.every((o) => !o.proposed)")
    assert page.locator("#proposals").is_hidden()
    screenshot(page, "found_kept")

    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photo, data)
    download(page, "labelme").save_as(data / f"{photo.stem}.json")
    dataset, manifest = prepared(data, tmp_path / "prepared")
    assert manifest["rejected"] == []
    (record,) = dataset.images.values()
    labels = [instance.label for instance in record.instances]
    assert sorted(labels) == sorted(page.evaluate("state.objects.map((o) => o.label)"))
    assert {"pebble", "leaf"} <= set(labels)
    masks = [record.decode(instance) for instance in record.instances]
    np.testing.assert_array_equal(masks, shown_masks(page, record.size))


def test_by_keyboard_alone(page):
    page.focus("#sample")
    page.keyboard.press("Enter")
    wait(page, "state.id !== null")
    page.focus("#canvas")
    for key in ("z", "Space", "x", "Escape", "0"):  # only an arrow shows the cross-hair
        page.keyboard.press(key)
    assert page.evaluate("state.cross === null && state.points.length === 0")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    answered(page)
    page.keyboard.press("Escape")
    assert page.evaluate("state.points.length + state.masks.length") == 0
    page.keyboard.press("Space")
    answered(page)
    page.keyboard.press("x")
    answered(page, "state.points.length === 2")
    assert page.evaluate("state.labels") == [1, 0]
    page.keyboard.press("Enter")
    assert page.locator("#objects li").count() == 1
    page.locator("#objects button").press("Enter")
    assert page.locator("#objects li").count() == 0


def test_clicks_during_the_encoding_are_answered_after_it(page, some):
    """ViT-B encodes for 20 s on a CPU; here the request waits."""
    held = []
    page.route("**/v1/images*", lambda route: held.append(route))
    page.set_input_files("#file", some[0][0])
    wait(page, "state.image !== null")
    while not held:
        page.wait_for_timeout(20)
    page.mouse.click(*screen(page, 120, 80))
    page.mouse.click(*screen(page, 110, 90))
    wait(page, "$('status').textContent.includes('answered once it is done')")
    assert page.evaluate("state.points.length") == 2
    page.keyboard.press("Enter")  # faster than the server, too
    page.mouse.click(*screen(page, 250, 300))  # not this object's any more
    wait(page, "$('status').textContent.includes('your object is finished after it')")
    assert page.evaluate("state.points.length") == 2
    held.pop().continue_()
    wait(page, "state.objects.length === 1")
    assert page.evaluate("state.objects[0].area") > 0
    click(page, 250, 300)
    assert page.evaluate("state.points.length") == 1


def test_the_model_chosen_during_an_encoding_gives_the_answer(page, some):
    """And not the one before, whose encoding was under way."""
    held = []
    page.route("**/v1/images*", lambda route: held.append(route))
    page.evaluate("$('model').append(new Option('other'))")
    page.set_input_files("#file", some[0][0])
    wait(page, "state.image !== null")
    page.mouse.click(*screen(page, 120, 80))
    while not held:
        page.wait_for_timeout(20)
    page.select_option("#model", "other")
    with page.expect_request("**/v1/predict") as asked:
        with page.expect_request("**/v1/images?model=other"):
            held.pop().continue_()
        while not held:
            page.wait_for_timeout(20)
        held.pop().continue_(url=f"{page.url}v1/images?model=tiny")  # there is but one
    assert asked.value.post_data_json["model"] == "other"
    wait(page, "$('status').textContent.includes('not served any more')")
    wait(page, "$('model').options.length === 1 && $('model').value === 'tiny'")


@pytest.mark.parametrize("size", SIZES)
def test_nothing_moves_the_stage_and_everything_is_in_sight(open_page, some, size):
    page = open_page(size)
    drop(page, some[0][0], some[0][1], some[1][0])
    before = page.locator("#canvas").bounding_box()
    assert before["height"] > 0.35 * SIZES[size][1]  # large enough to work on

    def require_unmoved():
        assert page.locator("#canvas").bounding_box() == before
        assert page.evaluate("document.documentElement.scrollTop + document.body.scrollTop") == 0

    page.mouse.move(*screen(page, 125, 130))
    wait(page, f"state.preview !== null && {YELLOW} > 50")  # the preview can be seen
    screenshot(page, f"{size}_hover")
    click(page, 120, 80)
    require_unmoved()
    screenshot(page, f"{size}_click")
    page.click("#finish")
    require_unmoved()
    page.evaluate("state.objects = [...state.objects, ...state.objects, ...state.objects]")
    page.click("#finish")  # without a prompt: an error line
    assert "click on an object first" in status(page)
    require_unmoved()
    page.evaluate("$('live').textContent = 'A long line. '.repeat(40)")
    require_unmoved()
    page.hover("#objects li")
    screenshot(page, f"{size}_objects")
    page.click("#find")
    wait(page, "state.objects.some((item) => item.proposed)")
    require_unmoved()
    screenshot(page, f"{size}_found")
    width, height, _ = SIZES[size]
    for name in ("#finish", "#undo", "#label", "#exclude", "#next", "#model", "#find", "#least"):
        _require_in_sight(page, name, width, height)
    for kind in ("labelme", "coco", "png", "all"):
        _require_in_sight(page, f"[data-save={kind}]", width, height)
    page.click("#help summary")
    screenshot(page, f"{size}_help")


def _require_in_sight(page, selector, width, height):
    box = page.locator(selector).bounding_box()
    assert box["x"] >= 0, selector
    assert box["y"] >= 0, selector
    assert box["x"] + box["width"] <= width, selector
    assert box["y"] + box["height"] <= height, selector
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    hit = f"document.elementFromPoint({x}, {y})?.closest('{selector}') !== null"
    assert page.evaluate(hit), selector


def test_undo_brings_everything_back(page, some):
    drop(page, some[0][0])
    click(page, 120, 80)
    finish(page, "pebble")
    assert page.locator("#objects li").count() == 1
    page.click("#undo")  # Finish
    assert page.locator("#objects li").count() == 0
    assert page.evaluate("state.points.length === 1 && state.masks.length === 3")
    page.keyboard.press("Escape")
    page.click("#undo")  # Clear
    assert page.evaluate("state.points.length === 1 && state.masks.length === 3")
    page.click("#finish")
    page.click("#objects button")
    assert page.locator("#objects li").count() == 0
    page.keyboard.press("Control+z")  # remove
    assert page.evaluate("state.objects.map((o) => o.label)") == ["pebble"]
    name = page.locator("#objects input")
    name.fill("stone")
    name.press("Enter")
    wait(page, "state.objects[0].label === 'stone'")
    page.click("#undo")  # relabel
    assert page.evaluate("state.objects.map((o) => o.label)") == ["pebble"]
    for _ in range(9):
        page.click("#undo")
    assert "nothing to undo" in status(page)
    assert page.evaluate("state.objects.length + state.points.length") == 0


def test_each_object_has_the_label_of_its_prompt(open_page, some):
    """Whichever image is open, and whatever was typed since for another object."""
    page = open_page(has_touch=True)
    held = []
    page.route("**/v1/images*", lambda route: held.append(route))
    page.set_input_files("#file", [some[0][0], some[1][0]])
    wait(page, "state.image !== null")
    page.mouse.click(*screen(page, 120, 80))
    finish(page, "nut")  # faster than the server
    page.click("#next")
    wait(page, "state.index === 1 && state.image !== null")
    page.fill("#label", "leaf")
    while len(held) < 2:
        page.wait_for_timeout(20)
    for route in held:
        route.continue_()
    wait(page, "state.id !== null && state.queue[0].objects.length === 1")

    def require(*labels, field):
        found = page.evaluate("state.queue.map((p) => p.objects.map((o) => o.label))")
        assert (found, page.input_value("#label")) == (list(labels), field)

    def turn_to(index):
        page.tap(["#previous", "#next"][index])
        wait(page, f"state.index === {index} && state.id !== null")

    require(["nut"], [], field="leaf")

    # One is corrected on the first image, while new ones are marked on the second.
    turn_to(0)
    page.click("#objects .pick")
    require(["nut"], [], field="nut")
    turn_to(1)
    require(["nut"], [], field="leaf")
    click(page, 90, 80)
    page.click("#finish")
    page.fill("#label", "stone")
    page.click("#undo")
    require(["nut"], [], field="leaf")
    page.click("#finish")
    require(["nut"], ["leaf"], field="stone")
    turn_to(0)
    require(["nut"], ["leaf"], field="nut")
    click(page, 110, 90)
    page.click("#finish")
    require(["nut"], ["leaf"], field="stone")

    # What is undone comes back with its label; a label typed for a prompt outlives its last click.
    page.click("#undo")
    require(["nut"], ["leaf"], field="nut")
    page.click("#finish")
    page.click("#objects .pick")
    page.click("#clear")
    page.click("#undo")
    page.click("#finish")
    require(["nut"], ["leaf"], field="stone")
    click(page, 110, 90)
    page.fill("#label", "seed")
    page.click("#undo")
    require(["nut"], ["leaf"], field="seed")

    # A finger on the next button ends the typing, too.
    page.fill("#objects input", "pebble")
    turn_to(1)
    wait(page, "state.queue[0].objects[0].label === 'pebble'")
    require(["pebble"], ["leaf"], field="seed")


def test_what_the_server_has_lost_is_sent_again(page, some, address):
    """As after a restart: neither the image nor the answers are there any more."""
    drop(page, some[0][0])
    click(page, 120, 80)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    image = f"{address}v1/images/{page.evaluate('state.id')}"
    assert requests.delete(image, headers=bearer, timeout=60).status_code == 204
    page.keyboard.down("Shift")
    page.mouse.click(*screen(page, 5, 5))
    page.keyboard.up("Shift")
    answered(page, "state.masks.length === 1")
    assert "mask in" in status(page)

    # Without any server it says so in its own words, and goes on once there is one.
    page.route("**/v1/predict", lambda route: route.abort())
    page.mouse.click(*screen(page, 100, 90))
    wait(page, "$('status').className === 'bad'")
    assert "the server does not answer; is it running?" in status(page)
    page.unroute("**/v1/predict")
    page.mouse.click(*screen(page, 110, 100))
    answered(page, "state.points.length === 4 && $('status').className !== 'bad'")


@pytest.mark.slow
def test_a_restart_of_the_server_is_not_noticed(page, some, endpoint):
    """The endpoint ends and starts again between two clicks; it has lost the image."""
    settings, address = endpoint
    drop(page, some[0][0])
    click(page, 120, 80)
    serve.shutdown()
    page.mouse.click(*screen(page, 110, 90))
    wait(page, "$('status').className === 'bad'")
    assert "the server does not answer" in status(page)
    deploy(settings)
    wait_until_ready(address)
    page.keyboard.down("Shift")
    page.mouse.click(*screen(page, 5, 5))
    page.keyboard.up("Shift")
    answered(page, "$('status').className !== 'bad' && state.points.length === 3")
    assert "mask in" in status(page)


def canvas_pixels(page):
    """What the stage shows of the image alone: H x W x 3."""
    text = page.evaluate(
        """(async () => {
            const paint = new OffscreenCanvas(canvas.width, canvas.height);
            paint.getContext("2d").drawImage(state.image, 0, 0);
            const reader = new FileReader();
            const blob = await paint.convertToBlob({ type: "image/png" });
            await new Promise((done) => { reader.onload = done; reader.readAsDataURL(blob); });
            return reader.result.split(",")[1];
        })()"""
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """Images that a browser shows otherwise than samray, or not at all."""
    folder = tmp_path_factory.mktemp("odd")
    y, x = np.mgrid[:120, :160]
    deep = (1000 + 8 * x + 3 * y).astype(np.uint16)  # black in a browser
    Image.fromarray(deep).save(folder / "deep.tif")
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray((deep / 7).astype(np.float32)).save(folder / "float.tiff")
    colours = np.dstack([x, 2 * y, x + y]).clip(0, 255).astype(np.uint8)
    Image.fromarray(colours).save(folder / "colours.tif", compression="tiff_lzw")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colours).save(folder / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(colours).save(folder / "turned.png", exif=turned)
    alpha = np.dstack([colours, np.where(x < 80, 0, 255)]).astype(np.uint8)
    Image.fromarray(alpha).save(folder / "alpha.png")
    for name, orientation in [("upright_xmp", 1), ("turned_xmp", 6)]:
        xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'
        Image.fromarray(colours).save(folder / f"{name}.jpg", xmp=xmp.encode(), quality=95)
    Image.fromarray(colours).save(folder / "turned_xmp.webp", xmp=xmp.encode())
    for number, chunk in enumerate(["iTXt", "packed iTXt", "zTXt"]):
        text = PngImagePlugin.PngInfo()
        add = text.add_text if chunk == "zTXt" else text.add_itxt
        add("XML:com.adobe.xmp", xmp, zip=chunk != "iTXt")
        Image.fromarray(colours).save(folder / f"turned_xmp_{number}.png", pnginfo=text)
    return folder


def test_the_stage_shows_what_the_model_sees(page, odd_images):
    for path in sorted(odd_images.iterdir()):
        drop(page, path)
        wait(page, f"state.name === {path.name!r} && state.id !== null")
        expected = decode_image(path.read_bytes())
        found = canvas_pixels(page)
        assert found.shape == expected.shape, path.name
        if path.suffix == ".jpg":  # two decoders
            assert np.abs(found.astype(int) - expected).mean() < 2, path.name
        else:
            np.testing.assert_array_equal(found, expected, err_msg=path.name)
    own = page.evaluate("state.queue.filter((p) => p.shown === null).map((p) => p.name)")
    assert own == ["turned.jpg", "upright_xmp.jpg"]  # a preview of a large photo takes seconds
    count = page.evaluate("state.queue.length")
    text = odd_images.parent / "note.pdf"
    text.write_bytes(b"%PDF-1.7 no image")
    page.set_input_files("#file", text)
    wait(page, "$('status').textContent.includes('is no JPEG, PNG, BMP, TIFF or WebP file')")
    wait(page, f"state.queue.length === {count}")


def test_a_preview_is_what_the_model_sees(address, odd_images):
    def ask(body, **headers):
        headers = {"Authorization": f"Bearer {TOKEN}", **headers}
        return requests.post(f"{address}v1/preview", data=body, headers=headers, timeout=60)

    for path in odd_images.iterdir():
        raw = path.read_bytes()
        answer = ask(raw)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        picture = Image.open(io.BytesIO(answer.content))
        assert picture.mode in ("L", "RGB")
        np.testing.assert_array_equal(picture.convert("RGB"), decode_image(raw))
    assert picture.mode in ("L", "RGB")
    form = {"image": ("x.tif", (odd_images / "deep.tif").read_bytes())}
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.post(f"{address}v1/preview", files=form, headers=bearer, timeout=60)
    assert answer.status_code == 200
    buffer = io.BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, format="PNG")
    for body, headers, wanted in [
        (b"no image", {}, (415, "unsupported_format")),
        ((odd_images / "turned.png").read_bytes()[:-100], {}, (400, "invalid_image")),
        (buffer.getvalue(), {}, (413, "too_large")),
        (b"", {"Authorization": "Bearer wrong"}, (401, "unauthorized")),
        (b"", {"Origin": "https://elsewhere.example"}, (403, "forbidden")),
    ]:
        answer = ask(body, **headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == wanted


def test_the_page_loads_its_own_files_and_nothing_else(address):
    """Without a token, under a policy that allows no inline script or style."""
    page = requests.get(address, timeout=60)
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "script-src 'self'" in policy
    for name, kind in [("page.css", "text/css"), ("page.js", "text/javascript")]:
        answer = requests.get(f"{address}page/{name}", timeout=60)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("../endpoint.html", "..%2fendpoint.html", "nothing.js", "page.txt", ""):
        answer = requests.get(f"{address}page/{name}", timeout=60)
        assert answer.status_code == 404 or name == "../endpoint.html", name


def test_zoom_and_pan(page, some):
    drop(page, some[0][0])
    fitted = page.locator("#canvas").bounding_box()

    def scale():
        return page.locator("#canvas").bounding_box()["width"] / page.evaluate("canvas.width")

    first = scale()
    at = np.floor(screen(page, 120, 80))  # wheel events have whole coordinates
    x, y = (at - (fitted["x"], fitted["y"])) / first - 0.5
    page.mouse.move(*at)
    for _ in range(6):  # what lies under the pointer stays there
        page.mouse.wheel(0, -200)
    wait(page, f"canvas.getBoundingClientRect().width > {5 * fitted['width']}")
    np.testing.assert_allclose(screen(page, x, y), at, atol=1.5)
    assert page.evaluate("canvas.style.imageRendering") == "pixelated"
    screenshot(page, "zoomed")
    page.mouse.click(*at)
    answered(page)
    np.testing.assert_allclose(page.evaluate("state.points"), [[x + 0.5, y + 0.5]], atol=0.1)

    for press, release in [
        (lambda: page.keyboard.down("Space"), lambda: page.keyboard.up("Space")),
        (lambda: None, lambda: None),
    ]:
        button = "left" if press() is None and page.evaluate("state.spaceHeld") else "middle"
        page.mouse.move(400, 300)
        page.mouse.down(button=button)
        page.mouse.move(460, 340, steps=3)
        page.mouse.up(button=button)
        release()
        moved = np.add(at, (60, 40))
        np.testing.assert_allclose(screen(page, x, y), moved, atol=1.5)
        at = moved
    assert page.evaluate("state.points.length") == 1  # a pan is no click
    page.keyboard.press("0")
    assert page.locator("#canvas").bounding_box() == fitted
    page.keyboard.press("+")
    assert scale() == pytest.approx(1.5 * first)
    page.keyboard.press("-")
    assert page.locator("#canvas").bounding_box() == fitted


def test_fingers_exclude_and_pinch(open_page, some):
    page = open_page("narrow", has_touch=True)
    drop(page, some[0][0])
    page.touchscreen.tap(*screen(page, 120, 80))
    answered(page)
    page.tap("#exclude")
    page.touchscreen.tap(*screen(page, 20, 20))
    answered(page, "state.masks.length === 1")
    assert page.evaluate("state.labels") == [1, 0]
    page.tap("#exclude")
    before = page.locator("#canvas").bounding_box()
    cdp = page.context.new_cdp_session(page)
    x, y = screen(page, 120, 80)

    def touch(kind, spread):
        fingers = [{"x": x - spread, "y": y, "id": 0}, {"x": x + spread, "y": y, "id": 1}]
        points = [] if kind == "touchEnd" else fingers
        cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 20)
    for spread in (30, 40, 50, 60):
        touch("touchMove", spread)
    touch("touchEnd", 60)
    screenshot(page, "touch_pinched")
    after = page.locator("#canvas").bounding_box()
    assert after["width"] == pytest.approx(3 * before["width"], rel=0.05)
    np.testing.assert_allclose(screen(page, 120, 80), (x, y), atol=3)
    assert page.evaluate("state.points.length") == 2  # a pinch is no click
    _require_long_press_excludes(page, cdp)


def _require_long_press_excludes(page, cdp):
    """Once, while the finger is still down, without a menu of the browser; a drag is a box."""
    page.evaluate("""window.menus = [];
        document.addEventListener("contextmenu", (event) => menus.push(event.defaultPrevented))""")
    x, y = screen(page, 105, 60)

    def touch(kind, *fingers):
        cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(fingers)})

    touch("touchStart", {"x": x, "y": y})
    touch("touchMove", {"x": x + 2, "y": y + 1})  # no finger is still
    wait(page, "state.points.length === 3")
    answered(page)
    page.wait_for_timeout(700)
    screenshot(page, "touch_held")
    touch("touchEnd")
    answered(page)
    assert page.evaluate("state.labels") == [1, 0, 0]
    np.testing.assert_allclose(page.evaluate("state.points[2]"), (105.5, 60.5), atol=0.1)
    touch("touchStart", {"x": x, "y": y})
    touch("touchMove", {"x": x + 40, "y": y + 40})
    page.wait_for_timeout(700)
    touch("touchEnd")
    answered(page, "state.picture.box !== null")
    assert page.evaluate("state.labels") == [1, 0, 0]
    # Not every system sends this event for a touch, so one is sent here, too.
    page.evaluate(
        """([x, y]) => document.elementFromPoint(x, y).dispatchEvent(
            new MouseEvent("contextmenu", {bubbles: true, cancelable: true}))""",
        [x, y],
    )
    assert page.evaluate("menus.length > 0 && menus.every((prevented) => prevented)")


def test_a_reload_keeps_the_work(page, some, address):
    drop(page, some[0][0], some[1][0])
    click(page, 120, 80)
    finish(page, "pebble")
    page.keyboard.press("n")
    wait(page, f"state.name === {some[1][0].name!r} && state.id !== null")
    click(page, 90, 80)
    finish(page, "leaf")
    masks = shown_masks(page, (page.evaluate("canvas.height"), page.evaluate("canvas.width")))
    labels = "state.queue.map((p) => p.objects.map((o) => o.label))"
    refusal = {"error": {"code": "too_large", "message": "above the limit"}}
    page.route("**/v1/images*", lambda route: route.fulfill(status=413, json=refusal))
    page.reload()
    wait(page, "window.state && $('status').textContent.includes('above the limit')")
    assert page.evaluate(labels) == [["pebble"], ["leaf"]]  # not closed with the image
    page.unroute("**/v1/images*")
    page.reload()
    wait(page, "window.state && state.id !== null")  # with the token, and encoded again
    assert page.evaluate("state.index") == 1
    assert page.evaluate(labels) == [["pebble"], ["leaf"]]
    size = (page.evaluate("canvas.height"), page.evaluate("canvas.width"))
    np.testing.assert_array_equal(shown_masks(page, size), masks)
    other = page.context.new_page()  # another tab begins with nothing
    other.goto(address)
    wait(other, "window.$ && $('status').textContent.includes('token')")
    assert other.evaluate("state.queue.length") == 0
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#close-all")
    wait(page, "state.queue.length === 0")

    # From a server that still loads its models, too; an image opened meanwhile waits for them.
    page.route("**/v1/models", lambda route: route.fulfill(json={"models": []}))
    page.reload()
    wait(page, "window.$ && $('status').textContent.includes('the server is starting')")
    assert page.evaluate("state.queue.length") == 0
    page.set_input_files("#file", some[0][0])
    wait(page, "state.image !== null")
    page.unroute("**/v1/models")
    wait(page, "$('model').options.length > 0 && state.id !== null")


# Ask the page's database: `(store, mode, send) => ` the result of the request that `send` makes.
DATABASE = """((store, mode, send) => new Promise((done) => {
    const opening = indexedDB.open("samray", 1);
    opening.onsuccess = () => {
        const transaction = opening.result.transaction(store, mode);
        const request = send(transaction.objectStore(store));
        transaction.oncomplete = () => { opening.result.close(); done(request.result); };
    };
}))"""


def test_a_tab_deletes_only_what_closed_tabs_left(page, some, address):
    """Not what its original has, if it is a duplicate, nor what is open for longer than a week."""

    def session(tab):
        wait(tab, "window.state && sessionStorage.getItem('samray-session') !== null")
        return tab.evaluate("sessionStorage.getItem('samray-session')")

    def stored(tab, name):
        everything = f"IDBKeyRange.bound(['{name}'], ['{name}', []])"
        return f"{DATABASE}('files', 'readonly', (table) => table.count({everything}))"

    def age(tab, name):
        send = f"(table) => table.put({{...queue, time: Date.now() - 8 * 24 * 3600e3}}, '{name}')"
        read = f"(table) => table.get('{name}')"
        tab.evaluate(
            f"{DATABASE}('queues', 'readonly', {read})"
            f".then((queue) => {DATABASE}('queues', 'readwrite', {send}))"
        )

    drop(page, some[0][0])
    click(page, 120, 80)
    finish(page, "pebble")
    mine = session(page)
    with page.context.expect_page() as opened:
        page.evaluate("void window.open(location.href)")  # sessionStorage is copied
    duplicate = opened.value
    wait(duplicate, "window.state && state.id !== null && state.objects.length === 1")
    copied = session(duplicate)
    assert copied != mine
    assert duplicate.evaluate(stored(duplicate, copied)) == 1
    duplicate.once("dialog", lambda dialog: dialog.accept())
    duplicate.click("#close-all")
    wait(duplicate, f"{stored(duplicate, copied)}.then((count) => count === 0)")
    assert duplicate.evaluate(stored(duplicate, mine)) == 1
    duplicate.close()

    age(page, mine)
    later = page.context.new_page()
    later.goto(address)
    session(later)  # is there once old ones are deleted
    page.reload()
    wait(page, "window.state && state.id !== null")
    assert page.evaluate("state.objects.map((o) => o.label)") == ["pebble"]
    assert session(page) == mine

    age(page, mine)
    page.close()
    later.reload()
    wait(later, f"window.state && {stored(later, mine)}.then((count) => count === 0)")


def test_a_full_storage_is_said(page, some, address):
    cdp = page.context.new_cdp_session(page)
    origin = address.rstrip("/")
    cdp.send("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 1000})
    drop(page, some[0][0])
    wait(page, "$('status').textContent.includes('storage is full')")
    click(page, 120, 80)
    finish(page, "pebble")
    assert page.locator("#objects li").count() == 1


def mask_png(pixels, mode="L"):
    picture = Image.fromarray(pixels.astype(np.uint8) * (1 if mode == "P" else 255))
    if mode == "P":
        picture.putpalette([0, 0, 0, 0, 0, 0])  # both colours black
    elif mode != "L":
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(label, kind, points, **more):
    fields = {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
    return {**fields, **more}


@pytest.fixture(scope="module")
def annotated(some, tmp_path_factory):
    """A photo with a LabelMe file of every shape, unusual ones among them."""
    folder = tmp_path_factory.mktemp("annotated")
    photo = shutil.copy(some[0][0], folder)
    width, height = Image.open(photo).size
    ring = np.hypot(*(np.mgrid[:41, :41] - 20.0))
    ring = (ring < 19) & (ring > 9)
    turns = np.arange(10) * 0.6283
    reach = np.where(np.arange(10) % 2, 18, 50)
    star = np.stack([60 + reach * np.sin(turns), 70 + reach * np.cos(turns)], axis=1).tolist()
    box = [[150, 20], [190, 60]]
    shapes = [
        shape("star", "polygon", star, description="kept", extra={"a": [1, 2.5]}),
        shape("bow", "polygon", [[200, 20], [260, 90], [200, 90], [260, 20]], group_id=3),
        shape("beyond", "polygon", [[-40, 150.6], [90.5, 120.2], [300.7, height + 60], [-9, 400]]),
        shape("sliver", "polygon", [[10.2, 10.9], [99.1, 14.3], [10.2, 10.9]]),
        shape("frame", "rectangle", [[230.7, 160.2], [180.1, 120.9]]),
        shape("four", "rectangle", [[10, 200], [60, 200], [60, 240], [10, 240]]),
        shape(
            "tilted", "rotation", [[100, 100], [140, 120], [120, 160], [80, 140]], direction=0.46
        ),
        shape("quad", "quadrilateral", [[120, 10], [140, 14], [138, 40], [118, 30]]),
        shape("disc", "circle", [[160.5, 170.5], [190.2, 180.1]]),
        shape("edge", "circle", [[width - 3.0, 40.0], [width + 20.0, 40.0]]),
        shape("ring", "mask", [[20, 30], [60, 70]], mask=mask_png(ring)),
        shape("one", "mask", [[70, 180], [110, 220]], mask=mask_png(ring, "1")),
        shape("palette", "mask", box, mask=mask_png(ring, "P")),
        shape("colour", "mask", [[150, 200], [190, 240]], mask=mask_png(ring, "RGBA")),
        shape("dragged", "mask", [[-7.5, 90.5], [33.5, 131.5]], mask=mask_png(ring)),
        shape("cut", "mask", [[200, 100], [220, 110]], mask=mask_png(ring)),
        shape("way", "linestrip", [[5, 5], [50, 9]]),
        shape("spot", "point", [[7, 7]]),
        shape("broken", "polygon", [[1, 1]]),
    ]
    document = {
        "version": "6.3.1", "flags": {"checked": True}, "shapes": shapes,
        "imagePath": Path(photo).name,
        "imageData": None, "imageHeight": height, "imageWidth": width, "note": "ours",
    }  # fmt: skip
    (folder / f"{Path(photo).stem}.json").write_text(json.dumps(document))
    return Path(photo), Path(photo).with_suffix(".json"), document


def test_labelme_files_are_shown_as_samray_reads_them(page, annotated, tmp_path):
    """All pixels of all shapes; what nobody touched is written back as it came."""
    photo, path, document = annotated
    drop(page, path, photo)
    wait(page, "state.objects.length > 0")
    labels = [shape["label"] for shape in document["shapes"]]
    assert page.evaluate("state.objects.map((o) => o.label)") == labels
    assert json.loads(Path(download(page, "labelme").path()).read_text()) == document
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photo, data)
    shutil.copy(path, data)
    dataset, _ = prepared(data, tmp_path / "prepared")
    (record,) = dataset.images.values()
    masks = shown_masks(page, record.size)
    known = [i.label for i in record.instances]
    assert known == labels[:-3]
    for instance, mask in zip(record.instances, masks, strict=True):
        np.testing.assert_array_equal(record.decode(instance), mask, err_msg=instance.label)
    screenshot(page, "labelme")


def test_labelme_files_are_corrected(page, annotated):
    photo, path, document = annotated
    drop(page, photo, path)
    wait(page, "state.objects.length > 0")
    rows = page.locator("#objects li")
    number = [shape["label"] for shape in document["shapes"]].index("disc")
    before = page.evaluate(f"state.objects[{number}].area")

    # The list and the image mark each other.
    rows.nth(number).hover()
    assert page.evaluate("state.lit.label") == "disc"
    page.mouse.move(*screen(page, 240, 80))
    assert page.evaluate("state.lit.label") == "bow"
    assert rows.nth(1).get_attribute("class") == "lit"

    # A click on the entry, then clicks in the image.
    rows.nth(number).click()
    assert page.evaluate("state.base.label") == "disc"
    assert page.input_value("#label") == "disc"
    click(page, 160, 170)
    page.keyboard.down("Shift")
    page.mouse.click(*screen(page, 185, 175))
    page.keyboard.up("Shift")
    answered(page, "state.points.length === 2")
    page.click("#finish")
    assert page.input_value("#label") == "object"
    assert page.evaluate(f"state.objects[{number}].area") != before
    name = rows.nth(0).locator("input")
    name.fill("sea star")
    name.press("Enter")
    wait(page, "state.objects[0].label === 'sea star'")
    rows.nth(1).locator("button").click()

    written = json.loads(Path(download(page, "labelme").path()).read_text())
    expected = [dict(shape) for shape in document["shapes"]]
    expected[0]["label"] = "sea star"
    corrected = written["shapes"][number - 1]
    assert corrected["shape_type"] == "mask"
    assert corrected["label"] == "disc"
    expected[number] = corrected
    del expected[1]
    assert written == {**document, "shapes": expected}


def test_what_does_not_belong_together_is_refused(page, some, annotated, tmp_path):
    photo, _, document = annotated
    foreign, small = tmp_path / "foreign.json", tmp_path / photo.with_suffix(".json").name
    foreign.write_text(json.dumps({**document, "imagePath": "elsewhere.jpg"}))
    small.write_text(json.dumps({**document, "imageWidth": 10, "imageHeight": 10}))
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    drop(page, photo, foreign, small, tmp_path / "coco.json")
    wait(page, "$('notes').textContent.includes('10 x 10 pixels')")
    assert "foreign.json belongs to none of these images" in status(page)
    assert f"{small.name} is not used" in status(page)
    assert "coco.json is not a LabelMe file" in status(page)
    assert page.locator("#objects li").count() == 0
    page.reload()
    wait(page, "window.state && state.id !== null")
    assert page.evaluate("state.document === null && state.jsonPath === null")
    click(page, 120, 80)
    finish(page, "mine")
    written = json.loads(Path(download(page, "labelme").path()).read_text())
    assert (written["imageWidth"], written["imageHeight"]) == Image.open(photo).size
    small.write_text(json.dumps(document))
    drop(page, small)
    wait(page, "$('notes').textContent.includes('has objects already')")
    assert page.evaluate("state.objects.map((o) => o.label)") == ["mine"]

    # Whose image cannot be shown is not downloaded without its shapes.
    page.route("**/v1/preview", lambda route: route.abort())
    Image.open(photo).save(tmp_path / "hidden.tif")
    (tmp_path / "hidden.json").write_text(json.dumps({**document, "imagePath": "hidden.tif"}))
    page.set_input_files("#file", [tmp_path / "hidden.tif", tmp_path / "hidden.json"])
    wait(page, "state.name === 'hidden.tif' && $('status').textContent.includes('not answer')")
    for kind in ("labelme", "coco", "png"):
        page.evaluate("$('live').textContent = ''")
        page.click(f"[data-save={kind}]")
        wait(page, "$('status').textContent.includes('before the image is shown')")
    archive = zipfile.ZipFile(download(page, "all").path())
    assert archive.namelist() == [small.name]
    assert "hidden.tif: the server does not answer" in status(page)
    page.unroute("**/v1/preview")
    archive = zipfile.ZipFile(download(page, "all").path())
    assert len(json.loads(archive.read("hidden.json"))["shapes"]) == len(document["shapes"])


def test_a_queue_of_images(page, photos, some, tmp_path):
    """A folder of images and one of LabelMe files: each image has its own, all are downloaded."""
    folder = tmp_path / "set"
    for image, annotation in some[:4]:
        for source in (image, annotation):
            target = folder / source.parent.name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (folder / "annotations" / some[3][1].name).unlink()
    (folder / "images" / "notes.txt").write_text("no image")
    cdp = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):  # from the desktop
        event = {"type": kind, "x": 300, "y": 300, "data": data}
        cdp.send("Input.dispatchDragEvent", event)
    wait(page, "state.id !== null && state.queue.every((p) => p.settled)")
    assert page.text_content("#position") == "1 of 4"
    counts = [len(json.loads(annotation.read_text())["shapes"]) for _, annotation in some[:3]]
    assert page.evaluate("state.queue.map((p) => p.objects.length)") == [*counts, 0]
    wait(page, "state.queue[1].id !== null")  # encoded ahead
    colours = page.evaluate("Object.fromEntries(state.colors)")
    assert len(set(colours.values())) == len(colours)
    for key, position in [("n", 2), ("PageDown", 3), ("p", 2), ("PageUp", 1), ("p", 1)]:
        page.keyboard.press(key)
        wait(page, f"state.index === {position - 1} && state.image !== null")
    assert "this is the first image" in status(page)
    for _ in range(3):
        page.click("#next")
    wait(page, "state.index === 3 && state.id !== null")
    assert page.text_content("#count") == "0"
    click(page, 100, 90)
    finish(page, "late")
    assert page.text_content("#count") == "1"
    page.click("#previous")
    wait(page, f"state.index === 2 && $('count').textContent === '{counts[2]}'")

    archive = zipfile.ZipFile(download(page, "all").path())
    assert archive.testzip() is None
    assert len(archive.namelist()) == 4
    for image, annotation in some[:3]:
        document = json.loads(archive.read(f"set/annotations/{annotation.name}"))
        assert document == json.loads(annotation.read_text()), image.name
    late = json.loads(archive.read(f"set/images/{some[3][0].stem}.json"))
    assert [entry["label"] for entry in late["shapes"]] == ["late"]
    assert late["imagePath"] == some[3][0].name
