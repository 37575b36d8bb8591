"""TensorBoard's page of a run in a real browser: the key charts show the run's points."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.image import imread

from small_jobs import SMALL

STEPS = 6
CHARTS = [
    "train/loss", "train/gradient_norm", "validation/loss", "throughput/ecg_per_s", "throughput/tflops_per_device",
    "throughput/mfu", "step/forward_share", "step/communication_share", "memory/host_rss_gb", "straggler/slowdown",
]  # fmt: skip
# What chromium asks of servers of its own is of no use here, and it needs no sandbox for a page of ours.
QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--window-size=1600,3000",
]  # fmt: skip
# The lines of each chart by its name, as TensorBoard draws them where it is told to draw with SVG.
LINES = """
return [...document.querySelectorAll('scalar-card')].map(card => [
  card.querySelector('.tag').textContent.trim(),
  [...card.querySelectorAll('line-chart .series-view svg path')].map(path => path.getAttribute('d') || '')
])
"""


@pytest.fixture(scope="module")
def run(shards, jobs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("board") / "run"
    more = [f"--train.steps={STEPS}", "--train.validate_every=1", "--train.log_every=1", "--engine.peak_tflops=0.05"]
    jobs.run(2, ["pretrain", *SMALL, *more, f"--data.shards={shards}", f"--run.dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def page(run, wait_for) -> Iterator[str]:
    """The address of TensorBoard's page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={run}", "--host=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: answers(f"{address}/data/plugins_listing"), limit_s=60)
            yield address
        finally:
            server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver: on Debian, apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in [*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=Service(driver)) as opened:
        yield opened


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def points(paths: list[str]) -> int:
    """Of a chart's longest line."""
    return max((len(re.findall("[ML]", path)) for path in paths), default=0)


def test_key_charts_show_the_run(page, browser, wait_for, tmp_path) -> None:
    wanted = "|".join(f"^{name}$" for name in CHARTS)
    browser.get(f"{page}/?forceSVG=true&tagFilter={wanted}#timeseries")
    shown: dict[str, int] = {}

    def complete() -> bool:
        shown.update({name: points(paths) for name, paths in browser.execute_script(LINES)})
        return shown == dict.fromkeys(CHARTS, STEPS)

    try:
        wait_for(complete, limit_s=60)
    except AssertionError as error:
        raise AssertionError(f"points of the charts that are shown: {shown}") from error
    picture = tmp_path / "page.png"
    browser.save_screenshot(str(picture))
    dark = imread(picture)[..., :3].max(axis=-1) < 0.6  # lines and letters
    assert 0.002 < dark.mean() < 0.5
