"""The page in Chromium. It needs gradio, playwright and Debian's chromium."""

import copy
import io
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageColor

pytest.importorskip("gradio", reason="pip install -r requirements-extra.txt")
pytest.importorskip("playwright", reason="pip install -r requirements-dev.txt")
CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright

from common.draw import COLORS
from data import Batches, Sample
from toy.scenes import scene_to_ask

BOX = "[0.25,0.25,0.75,0.75]"


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    """Serve a model that has learned one answer, twice -> the page's address."""
    model, folder = copy.deepcopy(tiny_model), tmp_path_factory.mktemp("web")
    [image], questions = scene_to_ask(0)
    sample = Sample([image], [(questions[-1], BOX)], "")
    arguments = model.tokenizer, model.template, model.spec, model.tokens_per_image, 512
    batch = Batches([sample], *arguments)[[0]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save(folder / "model")
    command = [sys.executable, "-um", "tools.web", f"--model={folder}/model,{folder}/model"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    options["env"] = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen([*command, "--device=cpu"], **options) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if found := re.search(r"http://\S+", line):
                break
        assert found, printed
        yield found[0]
        process.terminate()
        # a refused upload is a line in the browser and nothing here
        assert "Traceback" not in process.stdout.read()


@pytest.fixture
def page(server):
    """Open the page in Chromium. Nothing may ask another computer."""
    requests = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server)
        expect(page.get_by_label("Question")).to_have_value(re.compile("Where is"))
        yield page
    assert all(url.startswith((server, "data:", "blob:")) for url in requests)


def wait_for_a_box(page, image):
    """Wait until an image of the page has pixels of a box."""
    for _ in range(50):
        content = page.request.get(image.get_attribute("src")).body()
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        if (pixels == ImageColor.getrgb(COLORS[0])).all(-1).any():
            return
        page.wait_for_timeout(100)
    pytest.fail("no box was drawn")


def test_a_question_gets_an_answer_and_its_box_from_each_model(page, server):
    assert page.title() == "nanoMLLM" and server.startswith("http://127.0.0.1:")
    config = page.request.get(f"{server}/config").json()
    assert config["max_file_size"] == 50_000_000 and not config["analytics_enabled"]
    page.get_by_role("button", name="Ask").click()
    for i in range(2):
        answer = page.locator("textarea").locator("visible=true").nth(i)
        expect(answer).to_have_value(BOX)
        wait_for_a_box(page, page.locator("img").locator("visible=true").nth(i + 1))


def test_the_slider_changes_the_picture(page):
    page.get_by_label("Question").fill("Is it red?")
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("button", name="Look inside").click()
    figures = page.frame_locator("iframe").locator("figure")
    for name, last in (("Is it red?", "block 2, head 2"), ("patches as colors", "hidden[6]")):
        figure = figures.filter(has_text=name)
        image = figure.locator("img").locator("visible=true")
        before = image.screenshot()
        figure.locator("input").press("End")
        expect(figure.locator("p")).to_contain_text(last)
        assert image.count() == 1 and image.screenshot() != before


def test_a_broken_upload_is_refused_in_a_line(page, tmp_path):
    # cut in the middle: gradio reads the head of a file, common/images.py all of it
    path = tmp_path / "broken.png"
    Image.effect_noise((90, 60), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_label("Remove Image").wait_for()
    page.get_by_role("button", name="Ask").first.click()
    expect(page.get_by_text("not a readable image")).to_be_visible()
