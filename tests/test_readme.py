"""README and docs/ against the code: their Python runs, commands parse, tables and names are those of the code.

A command is given to the parser that would read it: the launcher's own, then the script's, then the settings tree.
"""

import importlib
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.layers import Mlp

from ase_dist.commands.main import COMMANDS, find_command, module_of
from ase_dist.config import ALIASES, Section, Settings, setting_keys
from ase_dist.errors import ExitCode
from ase_dist.moe import MoEFFN
from ase_dist.moe.sharding import Shard
from ase_dist.read_config import DEFAULT_CONFIG, load_settings, shipped_configs
from ase_dist.registries import AUGMENTATIONS, BALANCINGS, GATINGS, HEADS
from ase_dist.training.ds_config import read_ds_config, resolve, shipped_ds_configs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = "\n".join(FENCE.sub("", text) for text in PAGES.values())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ON_ONE_DEVICE = pytest.mark.single_gpu


def script(path):
    """A program of the repository that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLLOWER = script(ROOT / ".ci" / "readme.py")  # what runs the commands of the pages
FOLLOWED = {name for name in PAGES if FOLLOWER.followed_by(name)}  # by a test of their own


def blocks(language, pages=PAGES):
    return [text for name in pages for found, text in FENCE.findall(PAGES[name]) if found == language]


def table(page, header):
    """The cells of the rows of a page's table whose header line begins with ``header``, code marks taken off."""
    lines = itertools.dropwhile(lambda line: not line.startswith(header), PAGES[page].splitlines())
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines))[2:]
    assert rows, header
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Python


PYTHON = list(dict.fromkeys(blocks("python", [name for name in sorted(PAGES) if name not in FOLLOWED])))


def needs_deepspeed(block):
    return "deepspeed.initialize" in block


@ON_ONE_DEVICE
@pytest.mark.parametrize("block", [block for block in PYTHON if not needs_deepspeed(block)])
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"norm.weight": torch.ones(2)}}, "last.ckpt")  # which docs/weights.md converts
    registries = (AUGMENTATIONS, BALANCINGS, GATINGS, HEADS)
    before = [dict(registry.items()) for registry in registries]
    try:
        exec(compile(block, "page.md", "exec"), {"__name__": "__main__"})
    finally:
        for registry, entries in zip(registries, before, strict=True):
            for name in set(registry) - set(entries):
                del registry[name]


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.single_gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def test_python_for_deepspeed_runs_as_a_file(ranks, tmp_path):
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs or none, here is {torch.cuda.device_count()}")
    (block,) = filter(needs_deepspeed, PYTHON)
    check = f"assert (world.size, model.ffn.num_local_experts) == ({ranks}, {-(-7 // ranks)})\nruntime.stop()"
    (tmp_path / "block.py").write_text(block.replace("runtime.stop()", check))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in given}
    process = [sys.executable, *launcher, "block.py"]
    done = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def commands():
    """Every command of the bash blocks as a list of words, once; of pages that no test of their own follows."""
    texts = [text for text in blocks("bash", [name for name in sorted(PAGES) if name not in FOLLOWED])
             if "ssh-copy-id" not in text]  # tests/cluster's  # fmt: skip
    lines = "".join(text.replace("\\\n", " ") for text in texts).splitlines()
    words = dict.fromkeys(tuple(shlex.split(part, comments=True)) for line in lines for part in line.split("&&"))
    return [list(command) for command in words if command and command[0] not in SHELL]


def check_pip(*words):
    """The checkout, or a wheel that is built and installed."""
    extras, version = PROJECT["project"]["optional-dependencies"], PROJECT["project"]["version"]
    if words[:2] == ("install", "-e"):
        (target,) = words[2:]
        assert target == "." or re.fullmatch(r"\.\[(\w+)\]", target)[1] in extras, target
    elif words[0] == "install":
        assert words[1:] == (f"dist/ase_dist-{version}-py3-none-any.whl",)
    else:
        assert words == ("wheel", "--no-deps", "--wheel-dir", "dist", ".")


def check_pytest(path, *options):
    markers = [marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    assert (ROOT / path).is_dir()
    assert not options or (options[0] == "-m" and options[1] in markers and len(options) == 2), options


def check_deepspeed(*words):
    runner = importlib.import_module("deepspeed.launcher.runner")
    arguments = runner.parse_args(list(words))
    check_python(*["-m"] * arguments.module, arguments.user_script, *arguments.user_args)


def check_torchrun(*words):
    launcher = importlib.import_module("torch.distributed.run")
    arguments = launcher.get_args_parser().parse_args(list(words))
    check_python(*["-m"] * arguments.module, arguments.training_script, *arguments.training_script_args)


def check_python(script, *words):
    """A command by its script or by ``-m ase_dist``; of a benchmark the names of options alone."""
    if script == "-m":
        assert words[0] == "ase_dist"
        if words[1] in ("--help", "--print-completion"):
            return
        name, words = find_command(words[1:])
    else:
        assert (ROOT / script).is_file(), script
        name = " ".join(Path(script).with_suffix("").parts[1:])
    if name == "train":
        check_train(*words)
    elif script.startswith("benchmarks/"):
        known = re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text(encoding="utf-8"))
        assert {word for word in words if word.startswith("--")} <= set(known)
    elif "--help" not in words:
        module_of(name).parser().parse_intermixed_args(list(words))


def check_train(*words):
    """The options are known, the config is shipped, and the settings agree with DeepSpeed's file."""
    parser = module_of("train").parser()
    arguments = parser.parse_intermixed_args([word for word in words if word != "--help"])
    config = arguments.config or DEFAULT_CONFIG
    assert config in shipped_configs()
    path = arguments.deepspeed_config
    assert path in {None, *shipped_ds_configs()} or Path(path).parent.name == "ds_configs"
    json = read_ds_config(path if path in {None, *shipped_ds_configs()} else ROOT / path)
    resolve(load_settings(config, arguments.settings), json, world=2, native_bf16=False)


SHELL = ("eval", "echo", "mkdir")  # the shell's own, which .ci/readme.py runs

CHECKS = {
    "ase-dist": lambda *words: check_python("-m", "ase_dist", *words),
    "sphinx-build": lambda *words: None,  # .ci/run's
    "pip": check_pip,
    "pytest": check_pytest,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "python": check_python,
}


@ON_ONE_DEVICE
@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_that_exists(words):
    CHECKS[words[0]](*words[1:])


@ON_ONE_DEVICE
@pytest.mark.parametrize(
    "words",
    [
        ["python", "launch/train.py", "model.moe.num_expert=32"],
        ["python", "launch/train.py", "--config", "pascal_ase_16"],
        ["python", "launch/train.py", "--deepspeed_config", "ds_configs/z5.json"],
        ["torchrun", "--nproc_per_node", "2", "launch/training.py"],
        ["torchrun", "--number_of_ranks", "2", "launch/train.py"],
        ["deepspeed", "--gpus", "2", "launch/train.py"],
        ["python", "launch/make_scenes.py", "--sheet", "x.png"],
        ["python", "-m", "ase_dist", "make_scene", "x"],
        ["deepspeed", "--module", "ase_dist", "train", "--deepspeed_config", "z5"],
        ["torchrun", "--nproc_per_node", "2", "-m", "ase_dst", "train"],
        ["pip", "install", "dist/ase_dist-0.0.1-py3-none-any.whl"],
        ["python", "benchmarks/layer.py", "--shape", "vit_s"],
        ["pip", "install", "-e", ".[all]"],
        ["pytest", "tests", "-m", "one_gpu"],
    ],
    ids=" ".join,
)
def test_the_checks_of_commands_see_mistakes(words):
    with pytest.raises((AssertionError, ValueError, SystemExit, TypeError)):
        CHECKS[words[0]](*words[1:])


@ON_ONE_DEVICE
@pytest.mark.parametrize(
    "line",
    [
        "pip install -e . && deepspeed launch/train.py --deepspeed_config ds_configs/z2.json",
        "pip install -e '.[dev]' && pytest tests",
    ],
)
def test_the_two_command_lines_stand_alone(line):
    assert f"```bash\n{line}\n```" in README


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def value_of(settings, key):
    value = settings.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


@ON_ONE_DEVICE
def test_the_table_of_settings_is_that_of_the_code():
    default, scenes = Settings(), load_settings("scenes")
    for key, value, in_scenes, meaning in table("settings.md", "| key |"):
        assert yaml.safe_load(value) == value_of(default, key), key
        assert yaml.safe_load(in_scenes or value) == value_of(scenes, key), key
        assert meaning, key


@ON_ONE_DEVICE
def test_exit_codes_are_those_of_the_code():
    assert {int(code): name.upper() for code, name, _ in table("training.md", "| code |")} == {
        code: code.name for code in ExitCode
    }


@ON_ONE_DEVICE
def test_bytes_on_the_wire_are_those_of_the_code():
    with torch.device("meta"):
        base = Mlp(768, 3072).bfloat16()
    rows = []
    for experts, ranks in itertools.product(("lora", "ffn"), (2, 4, 8)):
        layer = MoEFFN(base, num_experts=16, k=3, num_shared=1, rank=4, experts=experts, shard=Shard(15, count=ranks))
        shape = layer.layer_shape()
        travelling = [shape.all_to_all_bytes(shape.expected_rows(images * 5 * 197)) / 1e6 for images in (1, 8)]
        gathered, crossover = f"{shape.gather_bytes() / 1e6:.2f}", f"{shape.crossover():.0f}"
        rows.append([experts, str(ranks), gathered, *(f"{value:.1f}" for value in travelling), crossover])
    assert table("expert_parallelism.md", "| experts | P |") == rows


@ON_ONE_DEVICE
def test_every_dependency_has_its_reason():
    project = PROJECT["project"]
    extras = {requirement for extra in project["optional-dependencies"].values() for requirement in extra}
    wanted = [*project["dependencies"], *(each for each in extras if not each.startswith("ase-dist["))]
    heads = [line.split(":")[0] for line in PAGES["dependencies.md"].splitlines() if line.startswith("- ")]
    named = [name for head in heads for name in re.findall(r"`([^`]+)`", head)]
    assert sorted(named) == sorted(re.match(r"[\w-]+", requirement)[0] for requirement in wanted)


@ON_ONE_DEVICE
def test_the_map_has_the_layers_in_their_order():
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [[name.strip().removeprefix("ase_dist.") for name in layer.split("|")] for layer in layers]
    places = [[re.search(rf"\b{name}(?:/|\.py)", PAGES["code_map.md"]).start() for name in layer] for layer in names]
    assert all(max(upper) < min(lower) for upper, lower in itertools.pairwise(places))


# ---------------------------------------------------------------------------------------------------------------------
# Names in the text

CODE = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))
FOLDERS = ("ase_dist/", "ds_configs/", "launch/", "tests/", "docker/", "benchmarks/", ".ci/", ".github/")
SECTIONS = {key.split(".")[0] for key in setting_keys() if "." in key}
OTHERS = {"--num_gpus", "--aug"}  # of launchers, whose parsers see it in a command, and of LibMTL


LINKS = sorted(
    {(name, link) for name, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))}
)


@ON_ONE_DEVICE
def test_links_and_pictures_are_there():
    """Of links into a page its headings too; the pages of the API are made by the build, which checks those."""
    lost = []
    for page, link in LINKS:
        place, _, heading = link.partition("#")
        folder = ROOT if page == "README.md" else ROOT / "docs"
        target = folder / place if place else folder / page
        if not link.startswith(("https://", "api/")) and not (
            target.is_file() and (not heading or heading in headings(target))
        ):
            lost.append(f"{page}: {link}")
    assert not lost


def headings(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    found = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found]


@ON_ONE_DEVICE
def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


@ON_ONE_DEVICE
def test_every_page_with_commands_is_followed():
    """By .ci/readme.py or by a test of its own; the same command is run once."""
    todo = FOLLOWER.to_run()
    lines = [line for page in todo.values() for line in page]
    assert len(lines) == len(set(lines)) and len(lines) > 30
    assert set(todo) | FOLLOWED == set(PAGES)
    assert {"own_data.md", "runs.md", "balancing.md", "partial_labels.md"} <= FOLLOWED


@ON_ONE_DEVICE
def test_every_setting_is_described():
    settings_page = script(ROOT / "docs" / "settings_page.py")
    assert settings_page.without_description() == []
    text = settings_page.sections()
    assert [key for key in setting_keys() if f"(setting-{key})=\n`{key}`\n: " not in text] == []
    assert (
        "`model.moe.k`\n: routed experts active per token\n\n  whole number >= 0; default `3`; on resume refused"
        in text
    )
    assert "one of `ase`, `naive`" in text and "`data.sets[].weight`" in text


@ON_ONE_DEVICE
def test_a_setting_without_a_description_fails_the_page():
    class Undescribed(Section):
        """A section."""

        key: int = 3

    settings_page = script(ROOT / "docs" / "settings_page.py")
    assert settings_page.without_description(Undescribed) == ["key"]
    with pytest.raises(ValueError, match="without a description: key"):
        settings_page._section(Undescribed, "", 2)


@ON_ONE_DEVICE
def test_paths_in_the_text_are_there():
    named = [name for name in CODE if name.startswith(FOLDERS) and " " not in name]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@ON_ONE_DEVICE
def test_settings_in_the_text_are_there():
    files = (".log", ".pt2", ".onnx", ".safetensors", ".json", ".bin")
    dotted = [name for name in CODE if re.fullmatch(r"\w+(\.\w+)+(=\S*)?", name) and not name.endswith(files)]
    named = [name for name in dotted if name.split(".")[0] in SECTIONS]
    assert named
    keys = {*setting_keys(), *ALIASES}
    entries = ("model.moe.aux_losses.", "train.loss_weights.", "data.sets.")  # of a dictionary, of a list
    assert [name for name in named if name.split("=")[0] not in keys and not name.startswith(entries)] == []
    for name in (
        name for name in named if re.fullmatch(r"[\w.]+=[a-z0-9.{}:\[\], ]+", name)
    ):  # no place, no blank to fill
        load_settings("scenes", [name])


@ON_ONE_DEVICE
def test_options_in_the_text_are_there():
    actions = [action for name in COMMANDS for action in module_of(name).parser()._actions]
    known = {option for action in actions for option in action.option_strings} | OTHERS
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', benchmark.read_text(encoding="utf-8")))
    assert {name.split()[0] for name in CODE if name.startswith("-")} <= known


@ON_ONE_DEVICE
def test_modules_in_the_text_are_there():
    for name in (name for name in CODE if re.fullmatch(r"ase_dist(\.\w+)+", name)):
        module, _, attribute = name.rpartition(".")
        parent = importlib.import_module(module)
        assert hasattr(parent, attribute) or importlib.util.find_spec(name), name


@ON_ONE_DEVICE
def test_every_shipped_config_is_named():
    assert [name for name in shipped_configs() if f"`{name}`" not in PAGES["data.md"]] == []
