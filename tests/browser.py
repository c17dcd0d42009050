"""Headless Chromium for test_page.py. Run by itself it makes the pictures in docs/: python tests/browser.py"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DOCS = Path(__file__).parent.parent / "docs"


def _run(page: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            *flags, page.resolve().as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def after(page: Path, script: str) -> str:
    """The text that a script, run when the page has been loaded, returns."""
    changed = page.with_suffix(".test.html")
    watch = "<script>window.failed = []; window.onerror = (...of) => { window.failed.push(of.join(' ')); };</script>"
    run = (
        "<script>(async () => { const out = document.createElement('pre'); out.id = 'result'; let found;"
        f"try {{ found = await (async () => {{ {script} }})(); }} catch (error) {{ window.failed.push(String(error)); }}"
        "out.textContent = '\\u0002' + (window.failed.length ? 'FAILED ' + window.failed.join('; ') : found) + '\\u0003';"
        "document.body.append(out); })();</script>"
    )
    text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + watch, 1)
    changed.write_text(text.replace("</body>", run + "</body>", 1), encoding="utf-8")
    found = _run(changed, "--dump-dom")
    return found[found.rindex("\u0002") + 1 : found.rindex("\u0003")]


def screenshot(page: Path, picture: Path, *, dark: bool = False, size: tuple[int, int] = (1400, 1500)) -> None:
    flags = [f"--screenshot={picture.resolve()}", f"--window-size={size[0]},{size[1]}"]
    _run(page, *flags, *(["--blink-settings=preferredColorScheme=0"] if dark else []))


def main() -> None:
    from flexmask.cli import main as flexmask

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        flags = ["--max_samples", "12", "--html", str(page), "--output", str(Path(folder) / "mask.png")]
        assert flexmask(["inspect", "flexmask/generated", "--tokenizer", "flexmask/tiny-random", *flags]) == 0
        screenshot(page, DOCS / "page.png")
        screenshot(page, DOCS / "page_dark.png", dark=True)


if __name__ == "__main__":
    sys.exit(main())
