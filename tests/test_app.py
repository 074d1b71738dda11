"""examples/app.py as its user sees it: in a real browser, without a window."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _cli
import generate
import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, expect, sync_playwright

APP = Path(__file__).parents[1] / "examples" / "app.py"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = ["--seconds", "2", "--steps", "16", "--seed", "3"]

TIMEOUT = 120_000  # milliseconds, for a busy machine
expect.set_options(timeout=TIMEOUT)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")


@pytest.fixture(scope="module")
def pipe_and_settings() -> tuple[Any, dict[str, Any]]:
    args = _cli.Parser(None).parse_args(SETTINGS)
    _cli.complete(args)
    return generate.load(args)[0], vars(args)


@pytest.fixture
def page() -> Iterator[Page]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, str(APP), *SETTINGS]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://[\w.:]+", line)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(TIMEOUT)
            page.goto(url, wait_until="domcontentloaded")
            yield page
            browser.close()
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(60) == 130
        finally:
            server.kill()  # harmless once it has ended; the block would wait for ever


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
