"""``hf://owner/name`` against a hub on this machine: exports, weights, cards and uploads; what goes wrong, in words."""

import json
import re

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import save

import ase_dist
from ase_dist import hub
from ase_dist.commands.main import main
from ase_dist.config import ModelSettings
from ase_dist.deployment import publish
from ase_dist.deployment.export import write_export
from ase_dist.deployment.reference import read_reference
from ase_dist.errors import RunError, UserError
from ase_dist.hub import Place
from ase_dist.models import build_model, fetch_from_hub, pretrained
from ase_dist.models.export_file import CARD, WEIGHTS, open_export
from ase_dist.models.weight_files import fetch_weights
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks
from tests.deployment.conftest import SETTINGS, photo
from tests.hub_server import client_settings, serve
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu
NAME = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty hub and an empty cache; no token."""
    with serve() as started:
        for name, value in client_settings(started.url, tmp_path / "cache").items():
            monkeypatch.setattr(constants, name, value, raising=False)  # earlier versions have some of them
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield started


@pytest.fixture
def token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    return server.token


@pytest.fixture
def files(export):
    return {name: (export / name).read_bytes() for name in (CARD, WEIGHTS)}


def chosen(**model):
    return build_settings({**SETTINGS, "model": {**SETTINGS["model"], **model}})


def refused(work, *, kind=UserError, secret="hf_secret"):
    with pytest.raises(kind) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message and secret not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://a/b", ("a/b", None, "")),
        ("hf:/a/b", ("a/b", None, "")),  # as pathlib writes it
        ("hf://a-1/b.c_d@v1.0", ("a-1/b.c_d", "v1.0", "")),
        ("hf://a/b/c/d.bin", ("a/b", None, "c/d.bin")),
        ("hf://a/b@main/c/", ("a/b", "main", "c")),
        ("hf://a/b@refs/pr/3/c.bin", ("a/b", "refs/pr/3", "c.bin")),
    ],
)
def test_a_place_is_read(text, place):
    assert hub.is_hub(text) and Place.read(text) == place
    assert Place.read(str(Place.read(text))) == place


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://a", "hf:///a/b", "hf://a/../b", "hf://a/b/../../c", "hf://datasets/a/b", "hf://a b/c", "hf://a/b@"],
)
def test_what_is_no_place_is_refused(text):
    assert "hf://owner/name" in refused(lambda: Place.read(text))


@pytest.mark.parametrize("text", ["none", "hub", "runs/a", "/hf/a/b", "https://huggingface.co/a/b", "hf"])
def test_other_names_are_not_of_the_hub(text):
    assert not hub.is_hub(text)


# ---------------------------------------------------------------------------------------------------------------------
# Exports


def test_an_export_loads_as_from_its_folder_and_only_its_files_are_fetched(server, files, model, export):
    server.put("me/tasks", {**files, "evil.py": b"raise SystemExit", "README.md": b"hello"})
    loaded = ase_dist.load("hf://me/tasks")
    image = photo()
    got, wanted = loaded.predict([image])[0], model.predict([image])[0]
    assert all((got[task] == wanted[task]).all() for task in wanted) and wanted
    assert server.fetched() == [f"main/{CARD}", f"{server.branches['me/tasks']['main']}/{WEIGHTS}"]


def test_a_revision_and_a_folder_are_taken(server, files):
    server.put("me/tasks", {f"small/{name}": data for name, data in files.items()}, branch="v1")
    server.put("me/tasks", {"README.md": b"later"})
    commit = server.branches["me/tasks"]["v1"]
    for revision in ("v1", commit):
        assert ase_dist.load(f"hf://me/tasks@{revision}/small").card.step == 7
    assert "has no file 'export.json'" in refused(lambda: ase_dist.load("hf://me/tasks@v1"))
    assert "no revision 'v2'" in refused(lambda: ase_dist.load("hf://me/tasks@v2"))


def test_files_of_two_commits_are_never_mixed(server, files, monkeypatch):
    """Somebody commits between the card and the weights."""
    server.put("me/tasks", files)
    first, download = server.branches["me/tasks"]["main"], huggingface_hub.hf_hub_download

    def then_commit(*args, **options):
        path = download(*args, **options)
        server.put("me/tasks", {WEIGHTS: b"another"})
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", then_commit)
    assert open_export("hf://me/tasks").folder.name == first


def test_the_cache_serves_where_there_is_no_network(server, files, monkeypatch):
    server.put("me/tasks", files)
    ase_dist.load("hf://me/tasks")
    count = len(server.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ase_dist.load("hf://me/tasks").card.step == 7
    assert len(server.asked) == count
    said = refused(lambda: ase_dist.load("hf://me/other"))
    assert "HF_HUB_OFFLINE is set" in said and "export.json is not in the cache" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.down = True  # the hub answers 503
    assert ase_dist.load("hf://me/tasks").card.step == 7


def test_a_hub_that_cannot_be_reached_is_a_matter_of_the_moment(server, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(
        file_download, "_DEFAULT_RETRY_ON_STATUS_CODES", (), raising=False
    )  # which waits for half a minute
    monkeypatch.setattr(file_download, "_DEFAULT_RETRY_ON_EXCEPTIONS", (), raising=False)
    server.down = True
    said = refused(lambda: ase_dist.load("hf://me/tasks"), kind=RunError)
    assert "cannot be reached" in said and "export.json is not in the cache" in said
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(RunError, match="cannot be reached") as caught:
        ase_dist.load("hf://me/tasks")
    assert caught.value.exit_code == 71


def test_what_may_not_be_read_says_how_to_log_in(server, files, monkeypatch):
    for name in ("me/private", "me/gated"):
        server.put(name, files)
    server.private.add("me/private")
    server.gated.add("me/gated")
    assert re.search(
        r"no such repository .* private; .*hf auth login", refused(lambda: ase_dist.load("hf://me/private"))
    )
    assert re.search(r"hf://me/gated is gated: ask for access", refused(lambda: ase_dist.load("hf://me/gated")))
    assert "no such repository" in refused(lambda: ase_dist.load("hf://me/nothing"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    for name in ("me/private", "me/gated"):
        assert ase_dist.load(f"hf://{name}").card.step == 7


def test_a_repository_without_an_export_says_what_it_has(server):
    server.put("timm/vit", {"model.safetensors": b"", "config.json": b"{}"})
    said = refused(lambda: ase_dist.load("hf://timm/vit"))
    assert "has no file 'export.json'; it has config.json, model.safetensors; " in said and "model.pretrained" in said


def test_an_export_that_git_has_cloned_without_its_large_files_is_named(files, tmp_path):
    (tmp_path / CARD).write_bytes(files[CARD])
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    assert "is a pointer of Git LFS" in refused(lambda: ase_dist.load(tmp_path))


def test_a_damaged_export_is_refused(server, files):
    server.put("me/tasks", {**files, WEIGHTS: files[WEIGHTS][:-1] + b"\x7f"})
    assert "damaged" in refused(lambda: ase_dist.load("hf://me/tasks"))


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def vit(seed):
    torch.manual_seed(seed)
    return timm.create_model(NAME, img_size=32, num_classes=0, **SMALL)


def weights(seed=0):
    return {name: tensor + 0.1 for name, tensor in vit(seed).state_dict().items()}


def loaded(source):
    model = vit(1)
    pretrained.load(model, source, name=NAME)
    return model.state_dict()


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({"model.safetensors": save(weights()), "pytorch_model.bin": b"unused"}, "hf://timm/vit"),
        ({"model.safetensors": b"unused", "deep/w.pth": save(weights())}, "hf://timm/vit/deep/w.pth"),
        ({"deep/model.safetensors": save(weights())}, "hf://timm/vit/deep"),
        ({"dinov3_vits16.pth": save(weights()), "README.md": b""}, "hf://timm/vit"),
        ({"dinov3_vits16.pth": save(weights()), "README.md": b""}, "hf://timm/vit@main"),
    ],
)
def test_weights_are_taken_from_a_repository_a_folder_or_a_file(server, files, source):
    server.put("timm/vit", files)
    got, wanted = loaded(source), weights()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert len(server.fetched()) == 1


def test_shards_are_fetched_with_their_index(server):
    tensors = weights()
    parts = {"a.safetensors": dict(list(tensors.items())[::2]), "b.safetensors": dict(list(tensors.items())[1::2])}
    places = {name: file for file, part in parts.items() for name in part}
    files = {f"x/{file}": save(part) for file, part in parts.items()}
    server.put("big/vit", {**files, "x/model.safetensors.index.json": json.dumps({"weight_map": places}).encode()})
    got = loaded("hf://big/vit/x")
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    assert server.fetched()[0] == "main/x/model.safetensors.index.json" and len(server.fetched()) == 3


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        (
            {"a.pth": b"", "b.bin": b""},
            "hf://a/b",
            r"several files of weights, .* a.pth, b.bin; name one",
        ),
        ({"README.md": b""}, "hf://a/b", r"no file of weights"),
        ({"w.pth": b""}, "hf://a/b/v.pth", r"no file of weights, the repository has w.pth"),
        ({"w.pth": b""}, "hf://a/c", r"no such repository"),
        ({"w.pth": b"<html>"}, "hf://a/b", r"is a web page"),
        ({}, "hf://a", r"wanted hf://owner/name"),
    ],
)
def test_weights_that_are_not_there_are_one_sentence(server, files, source, words):
    server.put("a/b", files)
    said = refused(lambda: loaded(source))
    assert said.startswith("model.pretrained: ") and re.search(words, said), said


def test_settings_are_pinned_to_a_commit_before_the_model_is_built(server, files):
    server.put("me/tasks", files)
    commit = server.put("timm/vit", {"model.safetensors": save(weights())})
    settings = chosen(pretrained="hf://timm/vit")
    pinned = fetch_from_hub(settings)
    assert pinned.model.pretrained == f"hf://timm/vit@{commit}/model.safetensors"
    server.put("timm/vit", {"model.safetensors": b"something else"})
    count = len(server.asked)
    assert fetch_weights(pinned.model.pretrained).path.is_file() and len(server.asked) == count
    started = fetch_from_hub(chosen(init_from="hf://me/tasks"))
    assert started.model.init_from == f"hf://me/tasks@{server.branches['me/tasks']['main']}"
    plain = chosen()
    assert fetch_from_hub(plain) is plain


def test_a_model_starts_from_an_export_on_the_hub(server, files, export):
    server.put("me/tasks", files)
    built = []
    for source in (str(export), "hf://me/tasks"):
        tree = chosen(init_from=source)
        built.append(build_model(tree, select_tasks("scenes", None), expert_layer="plain").state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


# ---------------------------------------------------------------------------------------------------------------------
# Cards


def evaluated(folder, **facts):
    """An export with scores, as a run that was evaluated gives it."""
    settings = build_settings(SETTINGS)
    tasks = select_tasks("scenes", None)
    scores = {"semseg": {"miou": 25.86, "iou/wall": 3.0, "images": 64.0}, "edge": {"bce": 0.04085, "ods_f": None}}
    all_facts = {"step": 7, "metrics": scores, "backbone": {}, "labelled_images": {"semseg": 480}, **facts}
    write_export(
        folder, build_model(settings, tasks, expert_layer="plain"), settings, tasks, dtype="fp32", facts=all_facts
    )
    return folder


def test_a_card_has_the_hubs_metadata_and_says_how_to_load(tmp_path):
    out = evaluated(tmp_path / "out")
    path = publish.write_model_card(open_export(out), repository="me/tasks", license_="mit", base_model="timm/vit")
    card = ModelCard.load(path)  # by the hub's own reader
    found = card.data.to_dict()
    assert (found["license"], found["library_name"], found["base_model"]) == ("mit", "ase-dist", "timm/vit")
    assert found["pipeline_tag"] == "image-segmentation" and found["datasets"] == ["scenes"]
    assert "mixture-of-experts" in found["tags"] and found["metrics"] == ["miou", "bce"]
    results = {(each.task_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert results == {("Semantic segmentation", "miou"): 25.86, ("Edges", "bce"): 0.04085}
    for part in (
        'ase_dist.load("hf://me/tasks")',
        "| Semantic segmentation |",
        "25.86",
        "0.04085",
        "| 480 |",
        "tvmonitor",
    ):
        assert part in card.text or part == "tvmonitor", part
    assert not re.search(r"\{\{|\bNone\b|iou/wall|\n\n\n", card.text)


def test_a_card_without_scores_or_repository_claims_none(export, tmp_path):
    text = publish.model_card(open_export(export).card, repository=None, license_="unknown", base_model=None)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "unknown" and not {"model-index", "base_model", "metrics"} & metadata.keys()
    assert "was not evaluated" in text and "hf://OWNER/NAME" in text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("scenes", "scenes"), ("/data/me/secret/dataset.yaml", "dataset"), ("my.module:NAME", "NAME"), ("a b", "a-b")],
)
def test_a_card_never_has_a_path_of_the_machine(name, wanted, export):
    card = open_export(export).card.model_copy(update={"data": name})
    text = publish.model_card(card, repository=None, license_="mit", base_model=None)
    assert yaml.safe_load(text.split("---")[1])["datasets"] == [wanted] and "secret" not in text


def test_a_card_that_somebody_has_changed_is_not_replaced(tmp_path):
    out = evaluated(tmp_path / "out")
    path = publish.write_model_card(open_export(out))
    assert publish.write_model_card(open_export(out), license_="mit") == path  # as it was written
    path.write_text(path.read_text().replace("## Tasks", "## My tasks"))
    assert "is not what this command wrote" in refused(lambda: publish.write_model_card(open_export(out)))
    for word in ("MIT License", "", "a\nb"):
        assert "--license" in refused(lambda word=word: publish.write_model_card(open_export(out), license_=word))


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("none", None),
        ("scenes", None),
        ("w.pth", None),
        ("hf://a/b@c/d.pth", "a/b"),
        ("hub", "timm/vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_the_base_model_is_what_the_settings_name(source, wanted):
    assert publish.base_model_of(ModelSettings(backbone="vit_small_patch14_dinov2", pretrained=source)) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Uploads


def test_an_export_is_uploaded_with_its_card_and_nothing_else(server, token, tmp_path, capsys):
    out = evaluated(tmp_path / "out")
    (out / "notes.txt").write_text("private")
    assert main(["export", str(out), "--push", "me/tasks", "--license", "mit"]) == 0
    said = capsys.readouterr()
    assert token not in said.out + said.err
    there = server.files("me/tasks")
    assert there.keys() == {CARD, WEIGHTS, "README.md"} and "me/tasks" not in server.private
    assert all(there[name] == (out / name).read_bytes() for name in there)
    assert ase_dist.load("hf://me/tasks").card.step == 7
    (out / "README.md").write_text("---\nlicense: mit\n---\nmy own words")
    assert main(["export", str(out), "--push", "me/tasks"]) == 0  # again, with the user's own card
    assert server.files("me/tasks")["README.md"].endswith(b"my own words")


def test_private_repositories_are_made_private_and_public_ones_are_refused(server, token, tmp_path, export):
    hub.upload("me/hidden", [export / CARD], private=True, message="m")
    assert "me/hidden" in server.private
    server.put("me/open", {})
    said = refused(lambda: hub.upload("me/open", [export / CARD], private=True, message="m"))
    assert "is there and public" in said and CARD not in server.files("me/open")


@pytest.mark.parametrize("name", ["tasks", "a/b/c", "a/b@main", "", "/"])
def test_a_name_that_is_no_repository_is_refused_before_any_work(server, token, name):
    refused(lambda: hub.check_upload(name))
    assert not server.asked


def test_an_upload_that_is_not_allowed_is_one_sentence(server, export, monkeypatch):
    assert "no token for the hub" in refused(
        lambda: hub.upload("me/tasks", [export / CARD], private=False, message="m")
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refused(lambda: hub.upload("me/tasks", [export / CARD], private=False, message="m"), secret="hf_wrong")
    assert "HTTP 401" in said and "hf auth login" in said
    monkeypatch.setenv("HF_TOKEN", server.token)
    said = refused(lambda: hub.upload("forbidden/tasks", [export / CARD], private=False, message="m"))
    assert "HTTP 403" in said and "rights" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(lambda: hub.upload("me/tasks", [export / CARD], private=False, message="m"))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "hf://me/tasks"], "--out: the model is on the hub"),
        (["export", "hf://me/tasks", "--format", "pt2"], "name the folder for the programs too"),
        (["export", "hf://me/tasks", "out", "--card"], "for its own folder"),
        (["export", "EXPORT"], "is an export already"),
        (["export", "nothing"], "is no export, so wanted the folder to make too"),
        (["export", "EXPORT", "--private"], "--private: it is said of the repository of --push"),
        (["export", "EXPORT", "--push", "tasks"], "wanted hf://owner/name"),
        (["export", "EXPORT", "--push", "me/tasks"], "there is no token for the hub"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(words, said, server, export, capsys):
    assert main([str(export) if word == "EXPORT" else word for word in words]) == 2
    assert said in capsys.readouterr().err


def test_a_reference_on_the_hub_needs_its_card_alone(server, tmp_path):
    out = evaluated(tmp_path / "out")
    server.put("me/tasks", {name: (out / name).read_bytes() for name in (CARD, WEIGHTS)})
    found = read_reference("hf://me/tasks")
    assert found.scores["semseg"]["miou"] == 25.86 and server.fetched() == [f"main/{CARD}"]


def test_predict_takes_a_model_of_the_hub(server, files, tmp_path, capsys):
    from PIL import Image

    server.put("me/tasks", files)
    Image.fromarray(photo()).save(tmp_path / "a.png")
    assert main(["predict", "hf://me/tasks", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a_edge.png").is_file()
    assert main(["predict", "hf://me/other", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 2
    assert "no such repository" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


def fetch_on_two_ranks(rank, folder):
    url = (folder / "url").read_text()
    for name, value in client_settings(url, folder / "cache").items():
        setattr(constants, name, value)
    found = fetch_from_hub(chosen(init_from="hf://me/tasks")).model.init_from
    card = open_export(found).card
    try:
        fetch_from_hub(chosen(pretrained="hf://me/nothing"))
    except UserError as error:
        return found, card.step, str(error)


def test_of_several_ranks_one_fetches_and_all_fail_with_its_sentence(files, tmp_path):
    with serve() as server:
        server.put("me/tasks", files)
        (tmp_path / "url").write_text(server.url)
        codes, results = start_world(fetch_on_two_ranks, tmp_path, size=2, seconds=120)()
        assert codes == [0, 0]
        assert server.fetched() == [f"main/{CARD}", f"{server.branches['me/tasks']['main']}/{WEIGHTS}"]
        pinned, step, said = results[0]
        assert results[1] == results[0] and step == 7
        assert pinned == f"hf://me/tasks@{server.branches['me/tasks']['main']}"
        assert "no such repository" in said
