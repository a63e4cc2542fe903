"""Open a page in a real browser, without a driver: a script is added to a copy of the page."""

import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
_RESULT = """<pre id="browser-result"></pre><script>
document.getElementById("browser-result").textContent = JSON.stringify((() => { SCRIPT })());
</script>"""


@functools.cache
def chromium():
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def run_in_browser(page: Path, script: str):
    """What ``script`` returns behind the scripts of the page.

    Fails on anything in the console: errors of any script, in promises too, and what scripts write
    there. The network is switched off: what the page would load is missing.
    """
    if chromium() is None:
        pytest.skip(f"no Chromium: none of {', '.join(_NAMES)} on the PATH")
    copy = page.with_suffix(".tested.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text + _RESULT.replace("SCRIPT", script), encoding="utf-8")
    options = (
        *_OPTIONS,
        "--enable-logging=stderr",
        "--proxy-server=127.0.0.1:9",
        f"--user-data-dir={page.parent}/browser",
    )
    done = subprocess.run(
        [chromium(), *options, "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    (result,) = re.findall(r'<pre id="browser-result">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(result))
