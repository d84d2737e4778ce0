"""Chromium for the tests that look at pages: the executable, its arguments, and a page that notes what it must not do."""
import os
import shutil

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
        " --hide-scrollbars").split()


def launch():
    """A running Chromium as a context manager; skips the test, with the reason, where there is none"""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (install it, or name it in the variable CHROMIUM)")
    return _Chromium(api)


class _Chromium:
    def __init__(self, api):
        self.api = api

    def __enter__(self):
        self.driver = self.api.sync_playwright().start()
        self.browser = self.driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        return self.browser

    def __exit__(self, *_):
        self.browser.close()
        self.driver.stop()


class Watch:
    """Notes script errors and requests that leave `home`"""
    def __init__(self, page, home=()):
        self.errors, self.outside = [], []
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((*home, "data:", "blob:", "about:")) else self.outside.append(r.url))

    def check(self):
        assert not self.errors, self.errors[:3]
        assert not self.outside, self.outside[:3]
