"""The tables and plots of results.md, from the folders of studies.

    python docs/results.py studies/evidence_ccp studies/evidence_rgbd    # takes these over, then writes the page anew
    python docs/results.py --check                                       # exit code 1 where the page has other tables

Of a study docs/results/NAME.json keeps results.json and study.json, NAME being that of its folder, and
docs/results/NAME/ the plots that the page shows. Its tables stand in the page between ``<!-- results: NAME -->`` and
``<!-- end of results -->``, as results.md of the study has them.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from ase_dist.study.tables import markdown

DOCS = Path(__file__).parent
PAGE, FOLDER = DOCS / "results.md", DOCS / "results"
MARK = re.compile(r"^(<!-- results: (\w+) -->\n).*?^(<!-- end of results -->)$", re.MULTILINE | re.DOTALL)


def take_over(study):
    """Keep the numbers of a study's folder, and the plots of it that the page shows."""
    parts = {part: json.loads((study / f"{part}.json").read_text(encoding="utf-8")) for part in ("study", "results")}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{study.name}.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    for name in re.findall(rf"\(results/{study.name}/(\w+\.png)\)", PAGE.read_text(encoding="utf-8")):
        (FOLDER / study.name).mkdir(exist_ok=True)
        shutil.copyfile(study / "plots" / name, FOLDER / study.name / name)


def tables(name):
    """What results.md of a study says below its title."""
    parts = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    study, results = parts["study"], parts["results"]
    for variant in results["variants"]:
        variant["images_per_second"] = []  # other work shared the processor; docs/speed.md has speeds
    text = markdown(study["title"], f"{study['data']}, {study['steps']} steps a run", results)
    return text.partition("\n")[2].strip("\n")


def renewed(text):
    """A page with the tables of every study made anew."""
    return MARK.sub(lambda match: f"{match[1]}\n{tables(match[2])}\n\n{match[3]}", text)


def main(*words):
    """Take over, then write or compare; 1 where the page differs and was only to be compared."""
    for word in words:
        if word != "--check":
            take_over(Path(word))
    text = PAGE.read_text(encoding="utf-8")
    is_stale = renewed(text) != text
    if is_stale and "--check" not in words:
        PAGE.write_text(renewed(text), encoding="utf-8")
    return int(is_stale and "--check" in words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
