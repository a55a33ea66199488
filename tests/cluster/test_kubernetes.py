"""What no Kubernetes here can run: manifests keep to their schemas, and every way of starting starts the same job.

The schemas come with packages of the dev extra; nothing is fetched.
"""

import copy
import itertools
import re

import pytest
import yaml

from ase_dist.cluster import container
from ase_dist.cluster.check import ClusterJob
from ase_dist.cluster.ssh import PORT
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu

CLUSTER, DOCKER = ROOT / "launch" / "cluster", ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
MANIFESTS = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
COMMAND = "launch/train.py --deepspeed_config ds_configs/z2.json"


def closed(required, **properties):
    """The schema of an object with these properties and no others."""
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


REPLICAS = closed("replicas template", replicas={"type": "integer", "minimum": 1}, template={"type": "object"},
                  restartPolicy={"enum": ["Never", "OnFailure"]})  # fmt: skip
MPIJOB = closed(  # of the operator's custom resource v2beta1, without the pods, which Kubernetes' own schema covers
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata={"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    spec=closed(
        "mpiReplicaSpecs",
        slotsPerWorker={"type": "integer", "minimum": 1},
        sshAuthMountPath={"type": "string"},
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        runLauncherAsWorker={"type": "boolean"},
        runPolicy=closed("", cleanPodPolicy={"enum": ["None", "Running", "All"]}, backoffLimit={"type": "integer"}),
        mpiReplicaSpecs=closed("Launcher Worker", Launcher=REPLICAS, Worker=REPLICAS),
    ),
)


def documents():
    """(file name, document) of every manifest."""
    return [(path.name, document) for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def pods(tree):
    """Every pod template below ``tree``."""
    if isinstance(tree, dict):
        if "containers" in tree.get("spec", {}):
            yield tree
        for value in tree.values():
            yield from pods(value)
    if isinstance(tree, list):
        for value in tree:
            yield from pods(value)


def validate(document):
    """Raise where a document does not keep to the schema of its kind, unknown keys included."""
    schemas = pytest.importorskip("kubernetes_validate", reason="it comes with the dev extra")
    import jsonschema

    kind = document["kind"]
    if kind == "MPIJob":
        jsonschema.validate(document, MPIJOB)
    elif kind in ("TrainingRuntime", "TrainJob"):
        models = pytest.importorskip("kubeflow_trainer_api.models", reason="it comes with the dev extra")
        model = getattr(models, f"TrainerV1alpha1{kind}").from_dict(copy.deepcopy(document))
        if model.to_dict() != document:  # the model drops what it does not know
            raise ValueError(f"{kind}: unknown keys or values of another type")
    else:
        schemas.validate(document, schemas.latest_version(), strict=True)
    for template in pods(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        schemas.validate(pod, schemas.latest_version(), strict=True)


@pytest.mark.parametrize(("name", "document"), documents())
def test_manifests_keep_to_their_schemas(name, document):
    validate(document)


@pytest.mark.parametrize(("name", "document"), documents())
def test_the_schemas_see_mistakes(name, document):
    broken = copy.deepcopy(document)
    broken["spec"]["spek"] = 3
    with pytest.raises(Exception):  # noqa: B017 - each library has its own
        validate(broken)
    if [*pods(document)]:
        broken = copy.deepcopy(document)
        next(pods(broken))["spec"]["containers"][0]["comand"] = ["x"]
        with pytest.raises(Exception):  # noqa: B017
            validate(broken)


def test_pods_run_as_the_images_user_on_the_shared_volume():
    user = int(re.search(r"^ARG USER_ID=(\d+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)[1])
    found = [template["spec"] for _, document in documents() for template in pods(document)]
    assert len(found) == 5
    for spec in found:
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == user
        assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "ase-dist"
        assert spec["containers"][0]["volumeMounts"][0] == {"name": "shared", "mountPath": "/shared"}


def test_pods_may_do_no_more_than_they_need():
    for name, document in documents():
        for template in pods(document):
            spec = template["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container_spec in spec["containers"]:
                allowed = container_spec["securityContext"]
                assert allowed["allowPrivilegeEscalation"] is False and allowed["capabilities"] == {"drop": ["ALL"]}
                if name == "job.yaml":  # no sshd, which insists on a home folder of its own
                    assert allowed["readOnlyRootFilesystem"] is True
                    writable = {mount["mountPath"] for mount in container_spec["volumeMounts"]}
                    assert writable == {"/shared", "/dev/shm", "/tmp", "/var/lib/ase"}
    home = re.search(r"--home-dir (\S+)", (DOCKER / "Dockerfile").read_text())[1]
    assert home == "/var/lib/ase"
    nodes = yaml.safe_load(COMPOSE.read_text())["services"]
    assert all(node["cap_drop"] == ["ALL"] and "no-new-privileges:true" in node["security_opt"]
               for node in nodes.values())  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The same command everywhere


def starts():
    """(where, words of the container's command) of everything that starts a job."""
    for name, document in documents():
        for words in itertools.chain(
            (pod["spec"]["containers"][0].get("args", []) for pod in pods(document)),
            [document["spec"].get("trainer", {}).get("args", [])],
        ):
            if "launch/train.py" in words:
                yield f"{name}: {document['kind']}", words
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())
    yield "compose", yaml.safe_load(text)["services"]["launcher"]["command"].split()


@pytest.mark.parametrize(("where", "words"), [*starts()])
def test_containers_start_the_one_command(where, words):
    arguments = container.parser().parse_args(words)
    assert arguments.role in ("launch", "wait")
    at = arguments.command.index("launch/train.py")
    job = ClusterJob.from_words(arguments.command[at:])
    assert " ".join(job.words[:3]) == COMMAND and job.shell_characters() == []
    assert job.output == "/shared/runs/scenes"
    if arguments.role == "wait":
        torchrun = pytest.importorskip("torch.distributed.run").get_args_parser()
        assert torchrun.parse_args(arguments.command[1:]).training_script == "launch/train.py"


@pytest.mark.parametrize("name", ["ssh.sh", "no_ssh.sh", "torchrun.sh", "slurm.sbatch"])
def test_scripts_start_the_one_command(name):
    assert COMMAND in (CLUSTER / name).read_text()


def test_ssh_has_one_port():
    assert f"Port {PORT}\n" in (DOCKER / "ssh_config").read_text()
    assert f"127.0.0.1:{PORT}" in COMPOSE.read_text()
    probes = [pod["spec"]["containers"][0].get("readinessProbe") for _, doc in documents() for pod in pods(doc)]
    assert [probe["tcpSocket"]["port"] for probe in probes if probe] == [PORT, PORT]
