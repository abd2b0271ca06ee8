"""The page in a real browser: Debian's Chromium, headless. Without one the test says so and is skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("flask")
pytest.importorskip("waitress")
pytest.importorskip("prometheus_client")
playwright = pytest.importorskip("playwright.sync_api")

from served import KEY, PARAMS, drawn_adapter, listening, offline, serving  # noqa: E402

from functional_lm.model import lora  # noqa: E402
from functional_lm.serving.app import Service  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium (as root, .ci/run does)")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root in a container
        yield made
        made.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    bank = lora.stack(PARAMS, [drawn_adapter(1)])
    with serving(("fox", "red"), engine={"bank": bank}) as made:
        yield made


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with listening(service) as url:
        yield url


class Visit:
    """A page, what its console said, and whom it asked."""

    def __init__(self, browser: Any, address: str, **how: Any) -> None:
        self.page = browser.new_context(**how).new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda line: line.type in ("error", "warning") and self.errors.append(line.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_function("document.getElementById('pick').options.length > 0")

    def ended(self) -> str:
        """What the page says at the end."""
        self.page.wait_for_function("document.getElementById('stop').disabled", timeout=20_000)
        text: str = self.page.text_content("#state")
        return text

    def said(self) -> str:
        text: str = self.page.text_content("#out")
        return text


def test_a_person_writes_picks_and_watches(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    page = visit.page
    assert page.locator("#pick option").all_text_contents() == ["fox", "red"]
    for name, value in (("prompt", "The quick"), ("temperature", "0"), ("top_p", "1"), ("max_tokens", "12")):
        page.fill(f"#{name}", value)
    page.click("#go")
    assert "tokens/s, first after" in visit.ended()
    assert visit.said() == "The quick" + offline("The quick", 12)
    page.select_option("#pick", "red")
    page.fill("#temperature", "1")
    page.fill("#seed", "7")
    page.click("#go")
    visit.ended()
    assert visit.said() == "The quick" + offline("The quick", 12, 1.0, 7, lora.merge(PARAMS, drawn_adapter(1)))
    assert visit.errors == []
    assert all(url.startswith(address) or url.startswith("data:") for url in visit.asked)


def test_all_of_it_works_from_the_keyboard(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    keyboard = visit.page.keyboard
    assert visit.page.evaluate("document.activeElement.id") == "prompt"
    keyboard.press("Control+A")
    keyboard.type("lazy")
    reached = []
    for _ in range(11):
        keyboard.press("Tab")
        reached.append(visit.page.evaluate("document.activeElement.id"))
    names = ["pick", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "key", "go"]
    assert reached[:10] == names
    visit.page.focus("#temperature")
    keyboard.press("Control+A")
    keyboard.type("0")
    visit.page.focus("#max_tokens")
    keyboard.press("Control+A")
    keyboard.type("5")
    visit.page.focus("#prompt")
    keyboard.press("Control+Enter")
    visit.page.wait_for_function("document.getElementById('state').textContent.includes('first after')")
    assert visit.said() == "lazy" + offline("lazy", 5)
    assert visit.errors == []


def test_it_stops_and_gives_the_slot_back(
    browser: Any, address: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, steps = Visit(browser, address), service.engine.board.steps
    for plain, step in list(steps.items()):
        monkeypatch.setitem(steps, plain, lambda *given, step=step: (time.sleep(0.05), step(*given))[1])
    visit.page.fill("#max_tokens", "80")
    visit.page.click("#go")
    visit.page.wait_for_function("document.getElementById('state').textContent.includes('tokens/s')")
    visit.page.click("#stop")
    assert visit.ended().startswith("stopped after")
    deadline = time.monotonic() + 10
    while service.engine.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.engine.stats()["running"] == 0
    assert visit.errors == []


def test_what_is_wrong_is_shown(browser: Any, address: str) -> None:
    visit = Visit(browser, address)
    visit.page.fill("#prompt", "x " * 500)
    visit.page.click("#go")
    visit.page.wait_for_function("document.getElementById('state').textContent.includes('the prompt has')")
    visit.page.fill("#prompt", "<img src=x onerror=alert(1)>")
    visit.page.fill("#max_tokens", "3")
    visit.page.click("#go")
    visit.ended()
    assert visit.page.locator("#out img").count() == 0
    assert visit.said().startswith("<img src=x")


def test_a_key_opens_it(browser: Any) -> None:
    with serving(api_keys=(KEY,)) as locked, listening(locked) as url:
        visit = Visit(browser, url, http_credentials={"username": "any", "password": KEY})
        visit.page.fill("#key", KEY)
        visit.page.fill("#prompt", "The")
        visit.page.fill("#temperature", "0")
        visit.page.fill("#max_tokens", "4")
        visit.page.click("#go")
        visit.page.wait_for_function("document.getElementById('state').textContent.includes('first after')")
        assert visit.said() == "The" + offline("The", 4)
        assert [error for error in visit.errors if "401" not in error] == []
