"""The photographs of the README and the site, from a run of the default config: `python docs/pictures.py runs/scenes`.

    predictions.jpg    the run's last grid of image, truth and prediction
    contact_sheet.jpg  generated scenes with their labels, as `ase-dist make-scenes --contact-sheet` draws them
    report.jpg         the upper part of the run's page, as Chromium shows it

They go into .github/images, or into the folder that is named second. speed.png there is the plot of
`benchmarks/layer.py --plot`. The drawings are those of drawings.py.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parents[1] / ".github" / "images"
WINDOW = (1280, 1332)  # of which the page is shown at 915 pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def predictions(run, folder):
    """The newest of the run's grids."""
    newest = sorted((run / "predictions").glob("step_*.png"))[-1]
    return Image.open(newest)


def contact_sheet(run, folder):
    """Scenes with their labels."""
    sheet = folder / "sheet.png"
    words = ["make_scenes", "--contact-sheet", str(sheet), "--size", "128"]
    subprocess.run([sys.executable, "-m", "ase_dist", *words], check=True)
    return Image.open(sheet)


def report(run, folder):
    """The page ``report.html`` of the run in a window of ``WINDOW``; RuntimeError without a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RuntimeError(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    shot = folder / "shot.png"
    size = ",".join(map(str, WINDOW))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    page = (run / "report.html").resolve().as_uri()
    subprocess.run([browser, *options, f"--window-size={size}", f"--screenshot={shot}", page], check=True, timeout=120)
    return Image.open(shot)


PICTURES = {"predictions": (predictions, 1500), "contact_sheet": (contact_sheet, 1364), "report": (report, 915)}


def main(run, out=IMAGES, names=tuple(PICTURES)):
    """Write the named pictures, each at most as wide as ``PICTURES`` says, in pixels."""
    for name in names:
        make, width = PICTURES[name]
        with tempfile.TemporaryDirectory() as folder:
            picture = make(Path(run), Path(folder)).convert("RGB")
        if picture.width > width:
            picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        picture.save(Path(out) / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
