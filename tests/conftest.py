"""What all tests share: threads, signals, and the devices that tests of arithmetic run on."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.settings import hand_in

# One thread: on models this small a second one costs more than it brings, and very much more on a busy machine.
torch.set_num_threads(1)
# A shell that starts tests in the background has them ignore Ctrl-C, and with them the programs that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What is bit for bit the same on a CPU is so on a GPU only if asked for; and float32 is not rounded to 10 bits.
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.allow_tf32 = False

# LITEFOCUS_TEST_DEVICE names another than a CUDA device (mps, xpu), or cpu for none.
OTHER_DEVICE = os.environ.get("LITEFOCUS_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", params=dict.fromkeys(["cpu", OTHER_DEVICE]))
def device(request: pytest.FixtureRequest) -> torch.device:
    """A CPU, and then the GPU where there is one. Random numbers are drawn and references computed on the CPU."""
    return torch.device(request.param)


@pytest.fixture
def small_grids_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids that an oracle can afford save fewer keys than make a focus call cheaper."""
    hand_in(monkeypatch, min_keys_saved=1)


@pytest.fixture
def one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all timesteps, as in exported code; the oracle knows no timesteps either."""
    hand_in(monkeypatch, num_samples=1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a program says to arguments that it refuses: one line, and exit code 2."""

    def run(main: Callable[[list[str]], Any], *arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return run


SLOW = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count what `-m "not slow"` leaves out. The processes of pytest-xdist hand it on to the one that reports."""
    config.stash[SLOW] = sum(item.get_closest_marker("slow") is not None for item in items)
    if hasattr(config, "workeroutput"):
        config.workeroutput["slow"] = config.stash[SLOW]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Take over what one of them has counted: all of them collect the same."""
    node.config.stash[SLOW] = getattr(node, "workeroutput", {}).get("slow", 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by playwright, whose event loop is gone after the module."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no browser: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say on which devices the tests that take `device` ran, and what was left out."""
    config = terminalreporter.config
    if config.option.markexpr == "not slow" and config.stash.get(SLOW, 0):
        terminalreporter.write_line(f"left out: {config.stash[SLOW]} slow tests, which pytest -m slow runs")
    found = "no other device was found or asked for" if OTHER_DEVICE == "cpu" else f"and on {OTHER_DEVICE}"
    terminalreporter.write_line(f"devices: tests of arithmetic ran on the CPU; {found}")
