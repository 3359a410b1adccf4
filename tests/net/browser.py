"""Real headless Chromium: what a page looks like, what it asks for, and whether everybody can use it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

WAIT_S = 20.0
BARRIERS = (Path(__file__).parent / "barriers.js").read_text(encoding="utf-8")
SCREENSHOTS = "P2PFM_SCREENSHOTS"
"""Environment variable: the folder where pictures are kept; else they go with the test's own folder."""

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"),
    *("--no-proxy-server", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-default-apps", "--force-device-scale-factor=1", "--lang=en-GB"),
)


def find_chromium() -> tuple[str, str] | None:
    """Browser and driver, if both are installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: apt-get install chromium chromium-driver"
)


class Browser:
    """One tab."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self._folder = driver, folder

    def open(self, url: str, theme: str = "light", width: int = 1280, height: int = 900) -> None:
        """Load a page as a reader with this theme and screen sees it, until it shows something."""
        self.driver.get("about:blank")
        self.complaints()
        self.asked()
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.resize(width, height)
        self.driver.get(url)
        self.until("return document.querySelector('#network-title') && document.title !== ''")

    def resize(self, width: int, height: int) -> None:
        """The screen's size [px]."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait until a script returns something that is true, and return it."""
        return WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(lambda _: self.run(script, *arguments))

    def text(self, selector: str) -> str:
        """What stands in an element."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)).strip()

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def shoot(self, name: str, width: int = 1280) -> None:
        """A picture of the whole page."""
        self.run("scrollTo(0, 0)")
        self.resize(width, int(self.run("return document.documentElement.scrollHeight")))
        self.driver.save_screenshot(str(self._folder / f"{name}.png"))
        self.resize(width, 900)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def asked(self) -> set[str]:
        """URLs that the page asked for since the last call, whatever for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        } | {message["params"]["url"] for message in messages if message["method"] == "Network.webSocketCreated"}

    def barriers(self) -> list[str]:
        """What keeps somebody from using or reading the page: see barriers.js."""
        return list(self.run(BARRIERS))


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser that keeps its pictures in $P2PFM_SCREENSHOTS, or else in `folder`."""
    found = find_chromium()
    assert found, "see needs_chromium"
    kept = Path(os.environ.get(SCREENSHOTS) or folder)
    kept.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    for flag in FLAGS:
        options.add_argument(flag)
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        yield Browser(driver, kept)
    finally:
        driver.quit()
