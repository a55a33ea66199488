"""What makes an export public: its model card, with the metadata that the Hugging Face hub reads, and its upload."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import StrictUndefined, Template

from ase_dist.config import ModelSettings
from ase_dist.errors import UserError, file_error
from ase_dist.evaluation.scores import CLASS_PREFIX, IMAGES, SET_MARK, format_score, score_of
from ase_dist.files import read_text, write_atomic
from ase_dist.hub import Place, is_hub, upload
from ase_dist.models.export_file import CARD, WEIGHTS, Card, Export
from ase_dist.overwriting import refuse_foreign
from ase_dist.tables import Table
from ase_dist.tasks import Kind, Task

FILE = "README.md"
PUBLIC = (FILE, CARD, WEIGHTS, "model.pt2", "model.onnx")  # the files of an export that are uploaded, and no others
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
MARK = re.compile(r"\n<!-- written by launch/export\.py --card, SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")
PIPELINES: dict[Kind, str] = {
    "classes": "image-segmentation",
    "mask": "image-segmentation",
    "edges": "image-to-image",
    "normals": "image-to-image",
    "depth": "depth-estimation",
}
PREDICTIONS: dict[Kind, str] = {
    "classes": "a class for each pixel, uint8 [H, W]",
    "mask": "a probability for each pixel, float32 [H, W]",
    "edges": "a probability for each pixel, float32 [H, W]",
    "normals": "a unit vector for each pixel, float32 [3, H, W]",
    "depth": "metres for each pixel, float32 [1, H, W]",
}

TEXT = """---
{{ metadata }}
---

# {{ name }}

One {{ card.model.backbone }} for {{ card.tasks | length }} dense-prediction tasks, {{ what }}, exported by ase-dist at
step {{ card.step }} of its training. The method is that of [arXiv 2510.00570](https://arxiv.org/abs/2510.00570).

## Tasks

{{ tasks }}

## Data

Trained on {{ data }}. The model sees {{ card.image.size }} pixels; other images are resized and predictions come at
their own size.

{% if card.labelled_images %}
{{ labels }}

{% endif %}
## Metrics

{% if metrics %}
On the validation images, by the run itself:

{{ metrics }}
{% else %}
The run was not evaluated at this step.
{% endif %}

## How to load

```python
import ase_dist

model = ase_dist.load("{{ place }}")
predictions = model.predict(["photo.jpg"])[0]  # an array by task, at the size of the photograph
```

A new run starts from it by `model.init_from={{ place }}`.

## Licence

`{{ license }}`
{%- if base_model %}; the backbone is [{{ base_model }}](https://huggingface.co/{{ base_model }}), whose own licence
holds too
{%- endif %}.

## Versions

{% for library, version in card.versions.items() %}
- {{ library }} {{ version }}
{% endfor %}
"""


def base_model_of(model: ModelSettings) -> str | None:
    """The repository on the hub that a run took its backbone from, as far as its settings say."""
    if is_hub(model.pretrained):
        return Place.read(model.pretrained).repository
    if model.pretrained != "hub":
        return None
    from timm.models import get_pretrained_cfg

    found = getattr(get_pretrained_cfg(model.backbone), "hf_hub_id", None)
    return found if found and "/" in found else None


def write_model_card(
    export: Export, *, repository: str | None = None, license_: str = "unknown", base_model: str | None = None
) -> Path:
    """Write README.md into the folder of ``export``; returns its path.

    ``repository`` is the owner/name under which the hub has it, ``license_`` an identifier of the hub's list,
    ``base_model`` the repository of the backbone. Raises UserError for other text, where there is a README.md that this
    function has not written or that was changed, and where it cannot be written.
    """
    if not LICENSE.fullmatch(license_):
        raise UserError(
            f"--license: got {license_!r}, wanted an identifier of the hub's such as apache-2.0, mit or other"
        )
    path = export.folder / FILE
    refuse_foreign([path], is_own=_is_own, option="--card")
    text = model_card(export.card, repository=repository, license_=license_, base_model=base_model)
    mark = f"\n<!-- written by launch/export.py --card, SHA-256 of the text above: {_sha256(text)} -->\n"
    try:
        write_atomic(path, text + mark)
    except OSError as error:
        raise file_error(error, f"--card: cannot write {str(path)!r} ({error.strerror or error})") from None
    return path


def push(export: Export, repository: str, *, private: bool) -> str:
    """Upload the files of ``export`` that are ``PUBLIC`` to a repository on the hub; returns its address.

    Raises as ``hub.upload``.
    """
    files = [export.folder / name for name in PUBLIC if (export.folder / name).is_file()]
    message = f"Export of step {export.card.step} by ase-dist {export.card.versions.get('ase_dist', '')}".strip()
    return upload(repository, files, private=private, message=message)


def model_card(card: Card, *, repository: str | None, license_: str, base_model: str | None) -> str:
    """The text: YAML of the metadata between lines of three hyphens, then Markdown."""
    from huggingface_hub import EvalResult, ModelCardData

    data = _data_name(card)
    name = (repository or f"{card.model.backbone}-{len(card.tasks)}-tasks").rpartition("/")[2]
    scores = list(_scores(card))
    results = [
        EvalResult(
            task_type=PIPELINES[task.kind],
            task_name=task.title,
            dataset_type=data,
            dataset_name=data,
            dataset_split="validation",
            metric_type=key,
            metric_name=_title(task, key),
            metric_value=value,
        )
        for task, key, value in scores
    ]
    pipelines = [PIPELINES[task.kind] for task in card.tasks]
    experts = ["mixture-of-experts"] * card.model.moe.enabled
    metadata = ModelCardData(
        license=license_,
        library_name="ase-dist",
        tags=["ase-dist", "multi-task", "vision-transformer", *experts, *sorted(set(pipelines))],
        pipeline_tag=max(dict.fromkeys(pipelines), key=pipelines.count),
        datasets=[data],
        metrics=list(dict.fromkeys(key for _, key, _ in scores)) or None,
        base_model=base_model,
        model_name=name if results else None,
        eval_results=results or None,
    )
    tasks = [
        (f"`{task.name}`", task.title, PREDICTIONS[task.kind], ", ".join(task.class_names) or "-")
        for task in card.tasks
    ]
    values = [
        (task.title, _title(task, key), format_score(value, score_of(task, key).unit)) for task, key, value in scores
    ]
    return Template(TEXT, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True).render(
        metadata=metadata.to_yaml().strip(),
        name=name,
        card=card,
        data=data,
        what=_what(card.model),
        tasks=Table(("task", "title", "prediction", "classes"), tasks).to_markdown(),
        labels=Table(
            ("task", "training images with a label"), list((card.labelled_images or {}).items())
        ).to_markdown(),
        metrics=Table(("task", "metric", "value"), values).to_markdown() if values else "",
        place=f"hf://{repository or 'OWNER/NAME'}",
        license=license_,
        base_model=base_model,
    )


def _scores(card: Card) -> Iterator[tuple[Task, str, float]]:
    """Every finite score of the card, without those of single classes, single sets and counts."""
    for task in card.tasks:
        for key, value in ((card.metrics or {}).get(task.name) or {}).items():
            is_detail = key.startswith(CLASS_PREFIX) or SET_MARK in key or key == IMAGES
            if value is not None and math.isfinite(value) and not is_detail:
                yield task, key, value


def _title(task: Task, key: str) -> str:
    score = score_of(task, key)
    return f"{score.title}, {score.unit}" if score.unit else score.title


def _data_name(card: Card) -> str:
    """The data set's name, never a path of the machine that trained on it."""
    if card.sets:
        return "+".join(each.title for each in card.sets)
    name = card.description.name if card.description is not None else card.data.rpartition(":")[2]
    return re.sub(r"[^\w.+-]+", "-", Path(name).stem if "/" in name else name).strip("-") or "own"


def _what(model: ModelSettings) -> str:
    moe = model.moe
    if not moe.enabled:
        return "with LoRA" if model.lora_rank else "trained whole"
    kind = "LoRA" if moe.experts == "lora" else "feed-forward"
    counts = f"{moe.num_experts}/{moe.k}/{moe.num_shared}/{moe.rank}"
    return f"with a mixture of {kind} experts (all/active/shared/rank {counts}, gating {moe.gating})"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_own(path: Path) -> bool:
    try:
        text = read_text(path)
    except UserError:
        return False
    found = MARK.search(text)
    return found is not None and _sha256(text[: found.start()]) == found[1]
