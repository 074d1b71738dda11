"""examples/app.py as its users see it: in real browsers, without a window, two at once."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _cli
import app
import generate
import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page, expect

import litefocus

APP = Path(__file__).parents[1] / "examples" / "app.py"
SETTINGS = ["--seconds", "2", "--steps", "4", "--seed", "3"]
ENDLESS = "1000"  # steps of a clip that others wait for
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

TIMEOUT = 120_000  # milliseconds, for a busy machine
expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def pipe_and_settings() -> tuple[Any, dict[str, Any]]:
    args = _cli.Parser(None).parse_args(SETTINGS)
    _cli.complete(args)
    return generate.load(args)[0], vars(args)


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with serving() as one:
        yield one


@contextlib.contextmanager
def serving() -> Iterator[SimpleNamespace]:
    """A server: its process, its address, and the lines that it has printed so far."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, str(APP), *SETTINGS, "--port", str(port)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **output) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "http://" in line:
                break
        assert f"http://127.0.0.1:{port}" in lines[-1], lines
        reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reader.start()
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", lines=lines, process=process)
        finally:
            process.kill()  # harmless once it has ended


@pytest.fixture
def visit(browser: Browser, server: SimpleNamespace) -> Iterator[Any]:
    """Opens the page as another user, every time."""
    contexts = []

    def visit(size: Any = DESK) -> Page:
        contexts.append(browser.new_context(viewport=size))
        contexts[-1].set_default_timeout(TIMEOUT)
        page = contexts[-1].new_page()
        page.goto(server.url, wait_until="domcontentloaded")
        expect(button(page, "Generate")).to_be_visible()
        return page

    yield visit
    for context in contexts:
        context.close()


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def fill(page: Page, label: str, value: str) -> None:
    """Until it stays: a part of the page that has just opened may put its own value back."""
    box = page.get_by_label(label, exact=True).first
    while box.input_value() != value:
        box.fill(value)
        page.wait_for_timeout(200)


def ask(page: Page, prompt: str, **others: str) -> None:
    fill(page, "prompt", prompt)
    if (others.keys() & {"steps", "guidance", "seed"}) and not page.get_by_label("steps").is_visible():
        page.get_by_role("button", name="advanced").click()
    for name, value in others.items():
        fill(page, "number input for seconds" if name == "seconds" else name, value)
    button(page, "Generate").click()


def download(page: Page) -> np.ndarray:
    with page.expect_download() as download:
        button(page, "Download").click()
    samples, rate = soundfile.read(io.BytesIO(download.value.path().read_bytes()), dtype="int16")
    assert rate == 16000
    return samples


def expected(pipe_and_settings: tuple[Any, dict[str, Any]], prompt: str, **others: Any) -> np.ndarray:
    pipe, settings = pipe_and_settings
    clip, _ = generate.generate(pipe, {**settings, "prompt": prompt, **others})
    assert np.abs(clip).max() > 0.01
    return (clip * 32767).astype(np.int16)


def wait_for(line: str, server: SimpleNamespace) -> None:
    until = time.monotonic() + TIMEOUT / 1000
    while not any(line in shown for shown in server.lines):
        assert time.monotonic() < until, server.lines
        time.sleep(0.05)


def test_a_prompt_becomes_a_clip_to_download(visit: Any, server: SimpleNamespace, pipe_and_settings: Any) -> None:
    page = visit()
    ask(page, "a slow bell", seconds="3", steps="5", guidance="2.5", seed="7")
    expect(button(page, "Play")).to_be_visible()
    told = re.compile(r"^a slow bell\n3 s of sound took \d+\.\d s, at most \d\.\d\d GiB of memory$")
    expect(page.get_by_text("3 s of sound took")).to_be_visible()
    assert any(told.search(part.inner_text()) for part in page.locator(".html-container").all())
    wanted = {"seconds": 3, "steps": 5, "guidance": 2.5, "seed": 7}
    assert np.array_equal(download(page), expected(pipe_and_settings, "a slow bell", **wanted))
    expect(page.get_by_alt_text("plot")).to_be_visible()

    # A mistake clears the clip and its figures, and is one line here and in the log.
    ask(page, "")
    expect(page.get_by_text("prompt must be text, and not empty")).to_be_visible()
    expect(button(page, "Play")).to_have_count(0)
    expect(page.get_by_text("of sound took")).to_have_count(0)
    expect(page.get_by_alt_text("plot")).to_have_count(0)
    assert [line for line in server.lines if "prompt must" in line] == [
        "error: prompt must be text, and not empty, got ''\n"
    ]
    assert "Traceback" not in "".join(server.lines)


def test_later_prompts(visit: Any, server: SimpleNamespace, pipe_and_settings: Any) -> None:
    page = visit()
    page.get_by_role("button", name="prompts over time").click()
    fill(page, "later prompts", "3: a snare drum\n\n6 : a fast mermaid")
    ask(page, "a slow drone", seconds="8")
    expect(page.get_by_text("8 s of sound took")).to_be_visible()
    expect(page.get_by_text("does not know: mermaid")).to_be_visible()
    with litefocus.schedule_prompts(pipe_and_settings[0], {3: "a snare drum", 6: "a fast mermaid"}):
        assert np.array_equal(download(page), expected(pipe_and_settings, "a slow drone", seconds=8))
    for lines, message in (
        ("a snare drum", "a later prompt needs the seconds at which it begins, got 'a snare drum'"),
        ("8: a snare drum", "a later prompt must begin above 0 and below 8 s, the clip's end, got 8"),
        ("3: a snare drum\n4: a bell", "later prompts must begin at least 2 s apart, the time from one to the next"),
    ):
        fill(page, "later prompts", lines)
        button(page, "Generate").click()
        expect(page.get_by_text(message)).to_be_visible()
    assert "Traceback" not in "".join(server.lines)


def test_two_users_get_what_each_asked_for_last(visit: Any, server: SimpleNamespace, pipe_and_settings: Any) -> None:
    first, second, third = visit(), visit(), visit()
    before = len(server.lines)
    ask(first, "a fast drone", steps=ENDLESS)
    expect(first.get_by_text(re.compile(rf"a fast drone: step [1-9]\d* of {ENDLESS}"))).to_be_visible()

    ask(second, "a slow bell")
    expect(second.get_by_text("queue: 1/1")).to_be_visible()
    button(second, "Cancel").click()
    expect(second.get_by_text("Cancelled.")).to_be_visible()
    expect(second.get_by_text("error", exact=False)).to_have_count(0)
    ask(third, "a snare drum")
    expect(third.get_by_text("queue: 1/1")).to_be_visible()  # the bell is out
    ask(second, "a medium breakbeat")
    expect(second.get_by_text("queue: 2/2")).to_be_visible()
    fill(second, "prompt", "a fast kick drum")  # what is typed next is not what was asked for

    third.close()  # and with it its place in the queue
    first.close()  # and with it its clip, which would run for minutes
    wait_for("a fast drone: cancelled", server)
    expect(second.get_by_text("2 s of sound took")).to_be_visible()
    expect(second.locator(".prompt")).to_have_text("a medium breakbeat")
    assert np.array_equal(download(second), expected(pipe_and_settings, "a medium breakbeat"))
    made = [line for line in server.lines[before:] if re.search("drone|(a slow bell|snare drum|breakbeat): 2 s", line)]
    assert [line.split(": ")[0] for line in made] == ["a fast drone", "a medium breakbeat"]


def test_a_running_clip_is_cancelled_and_the_next_begins(visit: Any, server: SimpleNamespace) -> None:
    page = visit()
    ask(page, "a fast cymbal", steps=ENDLESS)
    expect(page.get_by_text(re.compile(r"a fast cymbal: step [1-9]"))).to_be_visible()
    button(page, "Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    expect(page.get_by_text("error", exact=False)).to_have_count(0)
    wait_for("a fast cymbal: cancelled", server)
    expect(button(page, "Play")).to_have_count(0)
    ask(page, "a slow tom drum", steps="2")
    expect(page.locator(".prompt")).to_have_text("a slow tom drum")
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.slow
def test_memory_is_that_of_the_clip(visit: Any) -> None:
    page = visit()
    peaks = []
    for seconds in ("40", "1"):
        ask(page, "a slow bell", seconds=seconds, steps="1")
        told = page.get_by_text(re.compile(rf"{seconds} s of sound took"))
        expect(told).to_be_visible()
        peaks.append(float(re.search(r"at most (\d+\.\d+) GiB", told.inner_text())[1]))
    assert 0.1 < peaks[1] < peaks[0] - 0.05


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_shows_what_it_can_do(size: dict[str, int], visit: Any) -> None:
    page = visit(size)
    assert page.title() == "LiteFocus: long clips of sound from text"
    expect(page.get_by_role("heading", name="LiteFocus")).to_be_visible()
    expect(page.get_by_text("get a clip of up to ten minutes")).to_be_visible()
    expect(page.get_by_text("it knows kick drum, snare drum, cymbal, tom drum, tabla, drone")).to_be_visible()
    expect(page.get_by_label("steps")).not_to_be_visible()
    page.get_by_role("button", name="advanced").click()
    for name, value in (("steps", "4"), ("guidance", "5"), ("seed", "3")):
        expect(page.get_by_label(name, exact=True)).to_have_value(value)
    page.get_by_text("a medium breakbeat", exact=True).click()
    expect(page.get_by_label("prompt").first).to_have_value("a medium breakbeat")

    ask(page, "a slow <mermaid> bell $x", steps="2")
    expect(page.get_by_text("does not know: <mermaid>, $x")).to_be_visible()
    expect(page.locator(".prompt")).to_have_text("a slow <mermaid> bell $x")
    expect(page.get_by_alt_text("plot")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_ctrl_c_ends_it_while_a_clip_is_made(browser: Browser) -> None:
    with serving() as server:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(server.url, wait_until="domcontentloaded")
        ask(page, "a slow tabla", steps=ENDLESS)
        expect(page.get_by_text(re.compile(r"a slow tabla: step [1-9]"))).to_be_visible()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        assert "Traceback" not in "".join(server.lines)
        page.close()


def test_a_port_that_cannot_be_had_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for given, message in ((port, f"cannot serve on port {port}: Address already in use"), (0, "port must be bet")):
            with pytest.raises(SystemExit) as stop:
                app.parse(["--port", str(given)])
            assert stop.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"error: {message}" in line


def test_share_and_port_reach_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(app.generate, "load", lambda args: (None, None))
    monkeypatch.setattr(app, "page", lambda *_: SimpleNamespace(launch=lambda **options: asked.update(options)))
    monkeypatch.setattr(app.threading, "Event", lambda: SimpleNamespace(wait=lambda: None))
    app.main(["--share", "--port", "17861"])
    assert (asked["share"], asked["server_port"]) == (True, 17861)
