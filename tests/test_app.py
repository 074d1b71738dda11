"""examples/app.py as its user sees it: in a real browser, without a window."""

import io
import re
import shutil
from collections.abc import Iterator
from typing import Any

import generate
import numpy as np
import pytest
import soundfile

pytest.importorskip("gradio", reason="the extra `app` is not installed")
pytest.importorskip("playwright", reason="the extra `app` is not installed")

from playwright.sync_api import Page, expect, sync_playwright

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = ["--seconds", "2", "--steps", "16", "--seed", "3"]

TIMEOUT = 120_000  # milliseconds, for a busy machine
expect.set_options(timeout=TIMEOUT)

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore"),  # of Gradio's own parts
]


@pytest.fixture(scope="module")
def pipe_and_settings() -> tuple[Any, dict[str, Any]]:
    args = generate.Parser(None).parse_args(SETTINGS)
    generate.complete(args)
    return generate.load(args)[0], vars(args)


@pytest.fixture
def page(pipe_and_settings: tuple[Any, dict[str, Any]]) -> Iterator[Page]:
    import app

    blocks = app.page(*pipe_and_settings)
    _, url, _ = blocks.launch(prevent_thread_lock=True, show_error=True, quiet=True, server_name="127.0.0.1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(url, wait_until="domcontentloaded")
        yield page
        browser.close()
    blocks.close()


def test_a_prompt_becomes_a_clip_to_download(page: Page, pipe_and_settings: tuple[Any, dict[str, Any]]) -> None:
    pipe, settings = pipe_and_settings
    prompt, go = page.get_by_label("prompt"), page.get_by_role("button", name="Generate")
    prompt.fill("")
    go.click()
    expect(page.get_by_text("prompt must be text, and not empty")).to_be_visible()

    prompt.fill("a slow bell")
    go.click()
    expect(page.get_by_text(re.compile(r"\b[1-9]/16"))).to_be_visible()  # the progress bar counts steps
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("cancelled")).to_be_visible()
    expect(page.get_by_role("button", name="Play", exact=True)).to_have_count(0)

    page.get_by_label("number input for seconds").fill("3")
    go.click()
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    samples, rate = soundfile.read(io.BytesIO(download.value.path().read_bytes()), dtype="int16")
    expected, _ = generate.generate(pipe, {**settings, "prompt": "a slow bell", "seconds": 3})
    assert (rate, samples.shape) == (16000, (48000,))
    assert np.abs(expected).max() > 0.01
    assert np.array_equal(samples, (expected * 32767).astype(np.int16))
    expect(page.get_by_label("took")).to_have_value(re.compile(r"^\d+\.\d s, \d+\.\d\d GiB of memory at most$"))
    expect(page.get_by_alt_text("plot")).to_be_visible()
