"""The page at / in a real headless Chromium, against the embedded model served in this process."""

import mimetypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Error, Page, expect, sync_playwright
from starlette.types import ASGIApp, Receive, Scope, Send

from common import metrics
from common.cache import LocalTier, TieredCache
from common.config import MIB, ModelConfig
from common.media_storage import LocalStorage
from common.media_store import MediaStore
from deploy.app import EMBEDDED_MODEL, resolve_model
from deploy.demo import PICTURES
from deploy.shapes.scenes import render, scene_of
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.config import EngineConfig
from llm_service.server import LLMServer
from tests.clips import WEBM, animation, video
from tests.conftest import serving

DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
# Chromium draws a camera of its own, and nobody is asked whether it may be used.
CHROMIUM = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


MM_CACHE = ("fovea_mm_cache_hits_total", "fovea_mm_cache_queries_total")


class KeyDoor:
    """Asks for a key on the routes of the API once `key` is set, as the service does when it has keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.key: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.key is None or not scope["path"].startswith("/v1/") or given == f"Bearer {self.key}":
            await self._app(scope, receive, send)
            return
        body = b'{"error": {"message": "no valid key", "type": "authentication_error", "param": null, "code": null}}'
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server() -> Iterator[LLMServer]:
    model = resolve_model(ModelConfig(path=EMBEDDED_MODEL))
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(MIB), None))
    store = MediaStore(LocalStorage(MIB), ttl_s=3600, max_pinned_bytes=MIB)
    found = LLMServer(model, EngineConfig(), TieredCache(LocalTier(64 * MIB), None), encoder, media_store=store)
    yield found
    found.engine.shutdown()


@pytest.fixture(scope="module")
def door(server: LLMServer) -> KeyDoor:
    return KeyDoor(create_app(server))


@pytest.fixture(scope="module")
def url(door: KeyDoor) -> Iterator[str]:
    with serving(door) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=installed, args=CHROMIUM)
        except Error as exc:
            pytest.skip(f"there is no Chromium that starts: {exc.message.splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    found = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext, url: str) -> Iterator[Page]:
    """The open page; afterwards, nothing was reported to the console and nothing came from elsewhere."""
    found = context.new_page()
    complaints: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    requested: list[str] = []
    found.on("request", lambda request: requested.append(request.url))
    found.goto(url)
    expect(found.get_by_role("status")).to_have_text("shapes")
    yield found
    assert complaints == []
    assert [address for address in requested if not address.startswith((url, "blob:", "data:"))] == []


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two frames a second."""
    directory = tmp_path_factory.mktemp("clips")
    shown = moving_right("purple diamond")
    mp4 = video(shown, format="mp4", codec="libx264", pixel_format="yuv420p", fps=2)
    (directory / "moving.mp4").write_bytes(mp4)
    (directory / "moving.webm").write_bytes(video(shown, fps=2, **WEBM))
    (directory / "moving.gif").write_bytes(animation(shown, "GIF", duration_ms=500))
    (directory / "moving.webp").write_bytes(animation(shown, "WEBP", duration_ms=500))
    (directory / "still.gif").write_bytes(animation(shown[:1], "GIF"))
    (directory / "still.webp").write_bytes(animation(shown[:1], "WEBP"))
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for name, scene in PICTURES.items():
        render(scene).save(directory / name)
    return directory


def moving_right(what: str) -> list[Image.Image]:
    places = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
    return [render(scene_of((what, x, 0.5, 0.2), width=168, height=168)) for x in places]


def is_complaint(message: Any) -> bool:
    """A status above 399 is in the console too, and is what some tests are about."""
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def attach(page: Page, *paths: Path) -> None:
    page.get_by_label("Pictures and clips", exact=True).set_input_files([str(path) for path in paths])
    expect(page.locator("#pending figure")).to_have_count(len(paths))


def ask(page: Page, question: str, *paths: Path) -> None:
    if paths:
        attach(page, *paths)
    page.get_by_role("textbox", name="Question").fill(question)
    page.keyboard.press("Enter")
    wait_for_answer(page)


def wait_for_answer(page: Page) -> None:
    expect(page.locator(".turn.assistant").last.locator(".costs")).not_to_be_empty()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def answers(page: Page) -> list[str]:
    return page.locator(".turn.assistant p").all_inner_texts()


def captions(page: Page) -> list[str]:
    return [text.replace("\n", " ") for text in page.locator(".turn figcaption").all_inner_texts()]


def give_files(page: Page, event: str, path: Path) -> None:
    """Drops or pastes a file, which a browser that is driven cannot be made to do otherwise."""
    page.evaluate(
        """([event, name, type, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type}));
            document.dispatchEvent(event === "paste"
                ? new ClipboardEvent("paste", {clipboardData: data, cancelable: true})
                : new DragEvent(event, {dataTransfer: data, cancelable: true}));
        }""",
        [event, path.name, mimetypes.guess_type(path)[0], list(path.read_bytes())],
    )


def test_second_question_about_a_picture_shows_a_hit(page: Page, pictures: Path) -> None:
    before = metrics.snapshot()
    path = pictures / "two-shapes.png"
    ask(page, "What colour is the circle?", path)
    page.get_by_role("button", name="New").click()
    ask(page, "Is the red circle left or right of the blue square?", path)
    assert answers(page) == ["left"]
    assert captions(page)[0].startswith("64 tokens local memory ")
    assert page.locator("#rate").inner_text() == "50 %"
    assert page.locator("dd").first.inner_text() == "1"
    hits, queries = (metrics.snapshot()[name] - before[name] for name in MM_CACHE)
    assert hits / queries == 0.5
    page.evaluate("pollMetrics()")
    hits, queries = (metrics.snapshot()[name] for name in MM_CACHE)
    expect(page.locator("#service-rate")).to_contain_text(f"{round(hits / queries * 100)} % of {queries:.0f} pictures")


def test_conversation_goes_on_about_its_picture(page: Page, pictures: Path) -> None:
    ask(page, "What colour is the circle?", pictures / "two-shapes.png")
    ask(page, "图中有几个图形？")
    assert len(answers(page)) == 2 and all(answers(page))
    sources = page.locator("#sources dd").all_inner_texts()
    assert sum(map(int, sources)) == 2  # the picture is part of both requests


def test_drop_and_paste_attach_pictures(page: Page, pictures: Path) -> None:
    give_files(page, "dragover", pictures / "tall.png")
    expect(page.get_by_text("Drop pictures")).to_be_visible()
    give_files(page, "drop", pictures / "tall.png")
    give_files(page, "paste", pictures / "two-shapes.png")
    expect(page.get_by_text("Drop pictures")).to_be_hidden()
    expect(page.locator("#pending figcaption")).to_contain_text(["tall.png", "two-shapes.png"])
    page.get_by_role("button", name="Remove tall.png").click()
    expect(page.locator("#pending figcaption")).to_contain_text(["two-shapes.png"])


def test_second_question_about_a_clip_reuses_its_pairs_of_frames(page: Page, tmp_path: Path) -> None:
    clip = tmp_path / "clip.webm"
    clip.write_bytes(video(moving_right("green cross"), fps=2, **WEBM))
    for encoded, reused in ((3, 0), (0, 3)):
        ask(page, "Which way does it move?", clip)
        assert answers(page) == ["right"]
        [caption] = captions(page)
        assert caption.startswith("108 tokens of 6 frames")
        assert caption.endswith(f"pairs of frames: {encoded} encoded, {reused} reused")
        figures = page.locator("#last").inner_text().split("\n")
        assert figures[-6:] == ["Pairs of frames", "3", "encoded", str(encoded), "reused", str(reused)]
        assert figures[figures.index("of clips") + 1] == "108"
        page.get_by_role("button", name="New").click()


@pytest.mark.parametrize(
    ("name", "preview", "part"),
    [
        ("moving.webm", "video", "video_url"),
        ("moving.mp4", "video", "video_url"),
        ("moving.gif", "img", "video_url"),
        ("moving.webp", "img", "video_url"),
        ("still.gif", "img", "image_url"),
        ("still.webp", "img", "image_url"),
    ],
)
@pytest.mark.parametrize("event", ["drop", "paste", "button"])
def test_clip_is_attached_as_a_picture_is_and_can_be_removed_again(
    page: Page, clips: Path, name: str, preview: str, part: str, event: str
) -> None:
    def give() -> None:
        if event == "button":
            attach(page, clips / name)
        else:
            give_files(page, event, clips / name)

    give()
    expect(page.locator("#pending figcaption")).to_have_text([re.compile(rf"^{name}\d+ kB$")])
    expect(page.locator(f"#pending {preview}")).to_be_visible()
    page.get_by_role("button", name=f"Remove {name}").press("Enter")
    expect(page.locator("#pending figure")).to_have_count(0)
    give()
    ask(page, "What is this?")
    assert f'"type": "{part}"' in page.locator("#code").inner_text()
    expect(page.locator(f".turn.user {preview}")).to_be_visible()


def test_most_frames_of_a_clip_can_be_set(page: Page, clips: Path) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most frames of a clip").fill("2")
    page.keyboard.press("Enter")
    ask(page, "Which way does it move?", clips / "moving.webm")
    assert captions(page)[0].startswith("36 tokens of 2 frames")


@pytest.mark.parametrize(
    ("num_bytes", "limit"), [(21 * MIB, "limits.video.max_bytes"), (30 * MIB, "api.max_body_bytes")]
)
def test_clip_that_is_too_large_is_refused_with_the_limit(
    page: Page, tmp_path: Path, num_bytes: int, limit: str
) -> None:
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(num_bytes))
    attach(page, large)
    page.get_by_role("textbox", name="Question").fill("What is this?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text=limit)).to_be_visible()
    expect(page.locator("#pending figure")).to_have_count(1)


def test_file_that_is_neither_picture_nor_clip_is_not_attached(page: Page, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("no picture")
    page.get_by_label("Pictures and clips", exact=True).set_input_files(str(other))
    expect(page.get_by_role("alert").filter(has_text="notes.txt")).to_be_visible()
    expect(page.locator("#pending figure")).to_have_count(0)


def test_camera_snapshot_becomes_a_picture_and_the_camera_is_off_again(page: Page) -> None:
    page.get_by_role("button", name="Camera").click()
    expect(page.locator("#video")).not_to_have_js_property("videoWidth", 0)
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator("#pending figcaption")).to_contain_text("camera-")
    assert page.evaluate("document.getElementById('video').srcObject") is None


def test_everything_works_with_the_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Shift+Tab")  # the samples are just before the question, which has the focus
    while "triangles" not in page.evaluate("document.activeElement.textContent"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#pending figcaption")).to_contain_text(["triangles.png"])
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    expect(page.get_by_role("textbox", name="Question")).to_have_value("How many triangles are there?")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert answers(page) == ["three"]
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    while page.evaluate("document.activeElement.id") != "open-media":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Kept pictures")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Kept pictures")).to_be_hidden()


def test_media_are_kept_used_and_deleted(page: Page, pictures: Path) -> None:
    page.get_by_role("button", name="Media").click()
    page.get_by_label("Pictures to keep").set_input_files(str(pictures / "triangles.jpg"))
    row = page.locator(".medium")
    expect(row).to_contain_text("480 × 320 jpeg · 54 tokens · local · until")
    page.get_by_role("button", name="Use media-").click()
    ask(page, "How many triangles are there?")
    assert answers(page) == ["three"]
    assert captions(page)[0].startswith("54 tokens local memory ")
    assert '"media_id": "media-' in page.locator("#code").inner_text()
    page.get_by_role("button", name="Media").click()
    page.get_by_role("button", name="Delete media-").click()
    expect(page.get_by_text("Nothing is kept yet.")).to_be_visible()


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("two-shapes.png", "What colour is the circle?", "red"),
        ("moving.webm", "Which way does it move?", "right"),
    ],
)
def test_copied_code_gives_the_same_answer(
    page: Page, pictures: Path, clips: Path, tmp_path: Path, name: str, question: str, answer: str
) -> None:
    odd = tmp_path / f"it's $HOME `x` {name}"
    shutil.copy(next(path for path in (pictures / name, clips / name) if path.exists()), odd)
    ask(page, question, odd)
    copied = {}
    for tab in ("curl", "Python"):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        copied[tab] = page.evaluate("navigator.clipboard.readText()")
        expect(page.get_by_role("button", name="Copy", exact=True)).to_be_visible()
    by_curl = subprocess.run(["bash", "-c", copied["curl"]], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f'"content":"{answer}"' in by_curl.stdout
    by_python = subprocess.run(
        [sys.executable, "-c", copied["Python"]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert by_python.stdout == f"{answer}\n"


def test_key_is_asked_for_and_kept_in_memory_only(page: Page, door: KeyDoor) -> None:
    door.key = "secret of this test"
    try:
        page.get_by_role("textbox", name="Question").fill("Hello?")
        page.keyboard.press("Enter")
        page.get_by_label("Key, kept in memory until").fill(door.key)
        page.keyboard.press("Enter")
        wait_for_answer(page)
        assert "FOVEA_API_KEY" in page.locator("#code").inner_text()
        assert door.key not in page.content()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    finally:
        door.key = None


def test_refusal_is_shown_and_the_question_is_not_lost(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no picture")
    attach(page, broken)
    page.get_by_role("textbox", name="Question").fill("What is this?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="image")).to_be_visible()
    expect(page.get_by_role("textbox", name="Question")).to_have_value("What is this?")
    expect(page.locator("#pending figure")).to_have_count(1)


def test_answer_can_be_stopped(page: Page, server: LLMServer) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_role("textbox", name="Question").fill("Describe everything.")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("stopped")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_policy_lets_the_page_load_and_run_nothing_but_itself(context: BrowserContext, url: str) -> None:
    page = context.new_page()
    page.goto(url)
    policy = httpx2.get(url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.injected = 1\">')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'injected = 1'}))")
    page.wait_for_timeout(200)
    assert page.evaluate("window.injected") is None


@pytest.mark.parametrize(
    ("name", "viewport", "scheme", "moves"),
    [
        ("desktop", DESKTOP, "light", "red circle"),
        ("desktop-dark", DESKTOP, "dark", "orange circle"),
        ("phone", PHONE, "light", "purple circle"),
    ],
)
def test_nothing_is_cut_off_at_this_size(
    browser: Browser,
    url: str,
    pictures: Path,
    tmp_path: Path,
    name: str,
    viewport: Any,
    scheme: Any,
    moves: str,
    request: pytest.FixtureRequest,
) -> None:
    """With `--screenshots DIR` the pictures of the documentation are made here."""
    for path in pictures.iterdir():
        path.write_bytes(path.read_bytes() + name.encode())  # the same pixels, new to every cache
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    ask(page, "What colour is the circle?", pictures / "two-shapes.png")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("each question alone").check()
    page.keyboard.press("Enter")
    clip = tmp_path / "moving.gif"
    shown = moving_right(moves)
    clip.write_bytes(animation(shown[:4], "GIF", duration_ms=500))
    ask(page, "Which way does it move?", clip)
    ask(page, "Is the red circle left or right of the blue square?", pictures / "two-shapes.png")
    clip.write_bytes(animation(shown, "GIF", duration_ms=500))
    ask(page, "Which way does it move?", clip)
    keep = request.config.getoption("--screenshots")
    page.mouse.move(0, 0)  # off the last button, which it lights
    if keep:
        page.screenshot(path=Path(keep) / f"page-{name}.png")
    attach(page, pictures / "triangles.jpg", clip)
    too_wide = "element => element.scrollWidth - element.clientWidth"
    for selector in ("html", "body", "header", "main", "#log", "#composer"):
        assert page.locator(selector).evaluate(too_wide) <= 0, selector
    for button in page.locator("header button:visible, #composer button:visible").all():
        box = button.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
    figures = page.get_by_role("button", name="Figures")
    if figures.is_visible():
        figures.click()
        expect(page.locator("#rate")).to_be_in_viewport()
        assert page.locator("aside").evaluate(too_wide) <= 0
        if keep:
            page.screenshot(path=Path(keep) / f"page-{name}-figures.png")
    context.close()
