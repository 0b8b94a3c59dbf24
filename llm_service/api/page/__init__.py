"""GET /: the page to try the service on. One static file, and a policy under which it can load nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_HTML = (Path(__file__).parent / "index.html").read_text()


def content_security_policy(html: str) -> str:
    """Only the page's own inline script and style run, by their digests; requests go to this service alone."""
    script, style = (_digest_of_inline(html, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; img-src blob: data:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def create_router() -> APIRouter:
    router = APIRouter()
    headers = {
        "content-security-policy": content_security_policy(_HTML),
        "permissions-policy": "camera=(self), microphone=(), geolocation=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }

    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_HTML, headers=headers)

    return router


def _digest_of_inline(html: str, tag: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} <{tag}> elements"
    return "sha256-" + base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
