"""The HTML page in a real Chromium: it draws, answers mouse and keys, loads nothing, reads well in light and dark.

Skips itself, with the reason, where Chromium or its driver is missing; test_report.py holds the rest everywhere.
"""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import video_of
from traces import synthetic_run

from packforcing_cli.report import page, study
from packforcing_cli.trace import Health

PROMPT = "a red circle </script><img src=x onerror=\"document.title='bad'\"> שלום 🦊"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
BLOCKS = 40

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    missing = "Chromium" if CHROMIUM is None else "chromedriver"
    pytest.skip(
        f"{missing} is not installed: apt-get install chromium chromium-driver", allow_module_level=True
    )
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'"
)


class Page:
    """A page in the browser, with what the tests ask of it."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.path = driver, path

    def show(
        self, *, dark: bool = False, width: int = 1300, media: str = "", motion: str = "no-preference"
    ) -> None:
        """Open the page anew."""
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": motion}
        listed = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": listed})
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        self.driver.get(self.path.as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> None:
        end = time.monotonic() + 20
        while not self.ask(script):
            assert time.monotonic() < end, script
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys by their DOM names, as a keyboard would."""
        codes = {"Tab": 9, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "Enter": 13}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                what = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
                if key == "Enter" and kind == "rawKeyDown":
                    what |= {"type": "keyDown", "text": "\r"}
                self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", what)

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.driver.execute_cdp_cmd(
            "Input.dispatchMouseEvent",
            {
                "type": kind,
                "x": x,
                "y": y,
                "button": "none" if kind == "mouseMoved" else "left",
                "clickCount": 1,
            },
        )

    def point(self, column: float, row: float, *, click: bool = False) -> None:
        """Move the mouse to a place of the map, given in columns."""
        box = self.ask(
            "document.getElementById('map').scrollIntoView({block: 'center'});"
            "const m = document.getElementById('map').getBoundingClientRect();"
            "const left = Number(document.querySelector('#over svg rect.kept').getAttribute('x'));"
            "return {x: m.x + left, y: m.y, w: m.width - left - 6, h: m.height}"
        )
        x = box["x"] + (column + 0.5) * box["w"] / BLOCKS
        y = box["y"] + box["h"] - (row + 0.5) * box["h"] / BLOCKS
        self.mouse("mouseMoved", x, y)
        if click:
            self.mouse("mousePressed", x, y)
            self.mouse("mouseReleased", x, y)

    @property
    def column(self) -> int:
        return int(self.ask("return document.getElementById('timeline').getAttribute('aria-valuenow')"))

    @property
    def detail(self) -> str:
        return str(self.ask("return document.getElementById('detail').innerText"))

    def logged(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> set[str]:
        """Addresses asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, study.Study]:
    """A page of forty blocks with pictures, flags and two prompts."""
    folder = tmp_path_factory.mktemp("page")
    name = "20260102-150405-a-red-circle-1f3c2a"
    changes = {
        7: {"health": Health(("jump",), 120.0, 40.0, 2.0, 60.0, 0.01)},
        12: {"degenerate": (0, 2)},
        20: {"retry": 1},
    }
    asked = {"seconds": 40.0, "timeline": {"at": [{"time": "0:15", "prompt": "a blue square"}], "pins": []}}
    run = synthetic_run(
        folder / "run", BLOCKS, changes=changes, output=folder / "a.mp4", prompt=PROMPT, request=asked
    )
    video_of(folder / "a.mp4", BLOCKS, run=name, size=(128, 128))
    seen = study.collect(run)
    return page.write(seen, folder / "report 1 & <2>.html"), seen


@pytest.fixture(scope="module")
def browser(made: tuple[Path, study.Study], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver, made[0])
    finally:
        driver.quit()


def test_it_draws_everything_and_the_console_is_silent(browser: Page) -> None:
    browser.logged(), browser.requested()
    browser.show()
    assert browser.ask("return document.querySelectorAll('figure.chart .plot svg[role=img]').length") == 13
    empty = browser.ask(
        "return [...document.querySelectorAll('figure.chart .plot svg')].filter("
        "s => ![...s.querySelectorAll('.line, .area, rect')].some(e => e.getBoundingClientRect().width > 50"
        " || e.getBoundingClientRect().height > 20)).length"
    )
    assert empty == 0
    coloured = browser.ask(
        "const c = document.getElementById('cells');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 0; i < d.length; i += 4) if (d[i + 3] === 255) n++; return n / (d.length / 4)"
    )
    assert 0.02 < coloured < 0.6  # a part of the lower triangle
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.ask(broken) == 0
    assert browser.ask("return document.querySelectorAll('#strip image').length") > 5
    assert browser.logged() == []
    assert browser.ask("return document.title").startswith("a red circle </script>")
    assert browser.ask("return document.querySelector('h1').textContent") == PROMPT


def test_it_asks_the_network_for_nothing_and_could_not(browser: Page) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.requested()
            browser.show()
            browser.press("Tab", "Tab", "Tab", "Tab", "Tab", "ArrowLeft", "End")
            urls = browser.requested()
            assert urls and all(url.startswith(("file:", "data:")) for url in urls), urls
            address = f"http://127.0.0.1:{server.server_port}/"
            stopped = browser.driver.execute_async_script(
                "const [url, done] = arguments; const image = new Image(); image.src = url + 'image';"
                "const frame = document.createElement('iframe'); frame.src = url + 'frame';"
                "document.body.append(image, frame);"
                "fetch(url + 'fetch').then(() => done('reached'), () => done('stopped'))",
                address,
            )
            assert stopped == "stopped"
            assert browser.ask("window.bad = 1; const s = document.createElement('script'); s.text = 'window.bad = 2';"
                               "document.body.append(s); return window.bad") == 1  # fmt: skip
            assert asked == []
        finally:
            server.shutdown()
            thread.join()
    browser.logged()


def test_pointing_at_a_column_shows_what_it_recalled(browser: Page, made: tuple[Path, study.Study]) -> None:
    browser.show()
    seen = made[1]
    for block in (10, 25, 38):
        browser.point(block, 3)
        assert browser.column == block
        record = seen.records[block]
        assert record is not None
        assert browser.detail.startswith(f"Block {block} ·")
        shown = browser.ask(
            "return [...document.querySelectorAll('#detail .past')].map(l => [...l.querySelectorAll('button')].map("
            "b => Number(b.dataset.column)))"
        )
        assert sorted(shown[0]) == list(record.recalled)
        assert record.partitions is not None
        assert sorted(shown[1]) == sorted({*record.partitions.sink, *record.partitions.recent})
        arcs = browser.ask("return document.querySelectorAll('#strip path.arc').length")
        assert arcs == len(record.recalled)
    readout = browser.ask("return document.querySelector('#over').textContent")
    assert "looks back at 0:03" in readout


def test_layer_and_colour_can_be_chosen(browser: Page, made: tuple[Path, study.Study]) -> None:
    browser.show()
    browser.point(30, 3)
    before = browser.ask("return document.getElementById('cells').toDataURL()")
    browser.ask(
        "const s = document.getElementById('layer'); s.value = '2'; s.dispatchEvent(new Event('change'))"
    )
    record = made[1].records[30]
    assert record is not None
    shown = browser.ask(
        "return [...document.querySelectorAll('#detail .past')[0].querySelectorAll('button')].map("
        "b => Number(b.dataset.column))"
    )
    assert sorted(shown) == list(record.selected[1])
    layer = browser.ask("return document.getElementById('cells').toDataURL()")
    browser.ask("document.querySelector('input[value=score]').click()")
    scores = browser.ask("return document.getElementById('cells').toDataURL()")
    assert len({before, layer, scores}) == 3
    assert "importance 0" in browser.ask("return document.getElementById('scale').textContent")


def test_rows_can_be_ages(browser: Page, made: tuple[Path, study.Study]) -> None:
    browser.show()
    assert browser.ask("return document.getElementById('rows').value") == "time"
    browser.ask(
        "const s = document.getElementById('rows'); s.value = 'age'; s.dispatchEvent(new Event('change'))"
    )
    oldest = max(r.block - min(r.recalled) for r in made[1].records if r and r.recalled)
    row_height = browser.ask("return document.getElementById('map').getBoundingClientRect().height") / (
        oldest + 1
    )
    browser.point(30, BLOCKS - 1)  # the column, at the top: now
    box = browser.ask(
        "const m = document.getElementById('map').getBoundingClientRect(); return [m.x, m.y, m.width]"
    )
    left = float(browser.ask("return document.querySelector('#over svg rect.kept').getAttribute('x')"))
    x = box[0] + left + 30.5 * (box[2] - left - 6) / BLOCKS
    browser.mouse("mouseMoved", x, box[1] + 7.5 * row_height)
    assert "0:30 looks back at 0:23" in browser.ask("return document.querySelector('#over').textContent")


def test_a_click_holds_the_column_and_escape_lets_go(browser: Page) -> None:
    browser.show()
    browser.point(20, 5, click=True)
    browser.point(30, 5)
    assert browser.column == 20
    browser.ask("document.getElementById('timeline').focus()")
    browser.press("Escape")
    browser.point(31, 5)
    assert browser.column == 31


def test_the_keyboard_reaches_and_moves_everything(browser: Page) -> None:
    browser.show()
    order = []
    for _ in range(6):
        browser.press("Tab")
        order.append(
            browser.ask(
                "const e = document.activeElement; return e.id || e.value || e.dataset.column || e.className"
            )
        )
    assert order[:5] == ["skip", "layer", "rows", "share", "timeline"]
    assert order[5].isdigit() or order[5] == "scroll"  # a browser lets scrolling parts have the focus
    browser.ask("document.getElementById('timeline').focus()")
    moves = [("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("PageUp", 11), ("End", 39)]
    for key, expected in (*moves, ("ArrowRight", 39), ("PageDown", 29), ("ArrowUp", 30), ("ArrowDown", 29)):
        browser.press(key)
        assert browser.column == expected, key
        assert browser.detail.startswith(f"Block {expected} ·")
    said = browser.ask("return document.getElementById('timeline').getAttribute('aria-valuetext')")
    assert said.startswith("Block 29 at 0:29. Recalled ")
    cursor = browser.ask("return document.querySelector('figure .cursor').getAttribute('x1')")
    browser.press("ArrowLeft")
    assert float(browser.ask("return document.querySelector('figure .cursor').getAttribute('x1')")) < float(
        cursor
    )
    browser.press("Tab")
    while not browser.ask("return document.activeElement.dataset.column"):
        browser.press("Tab")
    outline = browser.ask(
        "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
    )
    assert outline == "solid3px"
    goal = int(browser.ask("return document.activeElement.dataset.column"))
    browser.press("Enter")
    assert browser.column == goal
    assert browser.ask("return document.activeElement.id") == "timeline"


def test_every_control_and_picture_has_a_name(browser: Page) -> None:
    browser.show()
    nameless = browser.ask(
        "return [...document.querySelectorAll('button, [role=slider], [role=img], img')].filter("
        "e => e.tagName === 'IMG' ? !e.hasAttribute('alt') : !(e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    unnamed = "return [...document.querySelectorAll('select, input')].filter(e => !e.labels.length).length"
    assert browser.ask(unnamed) == 0


LUMINANCE = """
const lin = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const lum = c => 0.2126 * lin(c[0]) + 0.7152 * lin(c[1]) + 0.0722 * lin(c[2]);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
const found = [];
for (const e of document.querySelectorAll(arguments[0])) {
  const style = getComputedStyle(e), ink = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
  if (!ink.startsWith('rgb') || !e.textContent.trim()) continue;
  const a = lum(rgb(ink)), b = lum(behind(e));
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 30)]);
}
return found;
"""
"""Contrast of every element's text with what is behind it, as WCAG 2 defines it."""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_in_both_schemes(browser: Page, dark: bool) -> None:
    browser.show(dark=dark)
    browser.point(12, 5)
    page_colour = browser.ask("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, page_colour[4:-1].split(","))) < 150) is dark
    what = "h1, h2, h3, h4, p, dt, dd, b, li, figcaption, label, td, th, code, .badge, span, svg text"
    found = browser.ask(LUMINANCE, what)
    assert len(found) > 150
    worst = min(found)
    assert worst[0] >= 4.5, worst
    assert min(browser.ask(LUMINANCE, "h1"))[0] >= 12


@pytest.mark.parametrize("width", [320, 375, 768, 1920])
def test_no_width_scrolls_sideways(browser: Page, width: int) -> None:
    browser.show(width=width)
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    beyond = browser.ask(
        "return [...document.querySelectorAll('p, h1, h2, li, figure, canvas, svg, select, td')].filter("
        "e => e.getBoundingClientRect().right > innerWidth + 1 && e.getBoundingClientRect().width).map("
        "e => e.outerHTML.slice(0, 60))"
    )
    assert beyond == []


def test_it_prints_without_controls(browser: Page) -> None:
    browser.show(media="print", dark=True)
    assert browser.ask("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("return getComputedStyle(document.querySelector('.controls')).display") == "none"
    columns = (
        "return getComputedStyle(document.querySelector('.explore')).gridTemplateColumns.split(' ').length"
    )
    assert browser.ask(columns) == 1
    assert min(browser.ask(LUMINANCE, "h1, p, dd, figcaption"))[0] >= 4.5


@pytest.mark.parametrize(("motion", "still"), [("reduce", True), ("no-preference", False)])
def test_nothing_moves_for_people_who_want_that(browser: Page, motion: str, still: bool) -> None:
    browser.show(motion=motion)
    lasts = browser.ask("return getComputedStyle(document.querySelector('.meter span')).transitionDuration")
    assert (lasts == "0s") is still


def test_a_width_change_draws_anew(browser: Page) -> None:
    browser.show(width=1300)
    wide = browser.ask("return document.getElementById('cells').clientWidth")
    shape = {"width": 600, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    browser.until(f"return document.getElementById('cells').clientWidth < {wide} - 100")
    assert browser.ask("return document.documentElement.scrollWidth") <= 600


@pytest.mark.parametrize("kind", ["old", "no bank", "one block", "long"])
def test_other_runs_draw_without_errors(
    browser: Page, tmp_path: Path, kind: str, make_other: Callable[[Path, str], Path]
) -> None:
    browser.logged()
    other = Page(browser.driver, make_other(tmp_path, kind))
    other.show(width=900)
    assert other.logged() == []
    assert other.ask("return document.querySelectorAll('figure.chart').length") >= 1
    other.ask("document.getElementById('timeline').focus()")
    other.press("Home", "End")
    assert other.detail.startswith("Block")


@pytest.fixture
def make_other() -> Callable[[Path, str], Path]:
    from traces import layout_of

    from packforcing_cli import trace

    def make(folder: Path, kind: str) -> Path:
        if kind == "no bank":
            run = synthetic_run(folder / "run", 6, layout=layout_of(top_k=0))
        elif kind == "one block":
            run = synthetic_run(folder / "run", 1, length=9, status="running")
        elif kind == "long":
            run = synthetic_run(folder / "run", 1000, with_blocks=False)
        else:
            run = synthetic_run(folder / "run", 4)
            lines = [{"block": n, "seconds": {"denoise": 0.1}, "cache": {"active": [[1]]}} for n in range(4)]
            (run / trace.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return page.write(study.collect(run), folder / "a.html")

    return make
