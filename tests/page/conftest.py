"""The page's server, in a process of its own, and a Chromium that looks at it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.page.browser import PATIENCE_MS, Page, Server
from tests.running.page import chromium

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

ROOT = Path(__file__).resolve().parents[2]
GRADIO_MISSING = "needs gradio 4.40.0, as `make test` installs it: pip install -r requirements-test.txt"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with chromium(tmp_path_factory.mktemp("browser")) as context:
        context.set_default_timeout(PATIENCE_MS)
        yield context


@pytest.fixture(scope="session")
def running_server(browser: BrowserContext, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """After the browser, without which it is not needed."""
    if find_spec("gradio") is None:
        pytest.skip(GRADIO_MISSING)
    folder = tmp_path_factory.mktemp("page")
    log, address = folder / "server.log", folder / "address"
    command = [sys.executable, "-m", "tests.page.server", str(folder)]
    with (
        log.open("w") as lines,
        subprocess.Popen(command, cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT) as process,
    ):
        while not address.exists():
            assert process.poll() is None, f"the page's server did not start:\n{log.read_text()}"
            time.sleep(0.05)
        yield Server(address.read_text())
        process.kill()


@pytest.fixture
def server(running_server: Server) -> Server:
    """As if just started."""
    running_server.reset()
    return running_server


@pytest.fixture
def page(server: Server, browser: BrowserContext) -> Iterator[Page]:
    page = Page(browser, server.url)
    yield page
    page.page.close()
    assert page.errors == []
