"""The KubeRay manifest: the pieces that matter, by the types of `ray.io/v1`; the operator validates the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from steersman import cli

MANIFEST = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "rayjob.yaml"


class Strict(BaseModel):
    """No unknown keys, and a string is no number, as in Kubernetes."""

    model_config = ConfigDict(extra="forbid", strict=True)


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")]
StartParams = dict[str, str]


class Variable(Strict):
    name: str
    value: str


class Mount(Strict):
    name: Name
    mountPath: str


class Resources(Strict):
    requests: dict[Literal["cpu", "memory"], Quantity]
    limits: dict[Literal["cpu", "memory"], Quantity]


class Container(Strict):
    name: Name
    image: str
    env: list[Variable] = []
    resources: Resources
    volumeMounts: list[Mount] = []


class Claim(Strict):
    claimName: Name


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim


class PodSpec(Strict):
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def mounts_have_volumes(self) -> PodSpec:
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        assert mounted <= {volume.name for volume in self.volumes}
        return self


class Template(Strict):
    spec: PodSpec


class Head(Strict):
    rayStartParams: StartParams
    template: Template


class Workers(Strict):
    groupName: Name
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: StartParams
    template: Template


class ClusterSpec(Strict):
    rayVersion: str
    headGroupSpec: Head
    workerGroupSpecs: list[Workers]


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int
    rayClusterSpec: ClusterSpec


class Metadata(Strict):
    name: Annotated[Name, Field(max_length=47)]  # the operator appends to it


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


JOB = RayJob.model_validate(yaml.safe_load(MANIFEST.read_text()))


def test_it_has_the_ray_that_the_project_pins() -> None:
    lock = (MANIFEST.parents[2] / "requirements.lock").read_text().splitlines()
    assert f"ray=={JOB.spec.rayClusterSpec.rayVersion}" in lock


def test_its_entrypoint_is_a_command_of_steersman() -> None:
    words = JOB.spec.entrypoint.split()
    command = typer.main.get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert words[0] == "steersman"
    assert {word for word in words if word.startswith("--")} <= options


def test_head_and_workers_run_one_image() -> None:
    cluster = JOB.spec.rayClusterSpec
    groups = [cluster.headGroupSpec, *cluster.workerGroupSpecs]
    assert len({group.template.spec.containers[0].image for group in groups}) == 1


def test_runs_outlive_the_cluster() -> None:
    (mount,) = JOB.spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].volumeMounts
    assert f"--runs {mount.mountPath}" in JOB.spec.entrypoint
