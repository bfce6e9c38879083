"""A cluster to start for a map, as people describe it in a TOML file: jobs of SLURM or PBS, or pods of Kubernetes.

One worker a job or pod, one GPU a worker: `workers` is the number of sheets that are predicted at once. For example

    kind = "slurm"
    workers = 8
    cores = 8
    memory = "48GB"
    walltime = "04:00:00"
    queue = "gpu"
    directives = ["--gres=gpu:1"]
    prologue = ["source /shared/canopy/.venv/bin/activate"]

The workers must see the imagery, the model and the output folder under the same paths as this machine.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from canopy.errors import ClusterError
from canopy.settings import read_settings

SUBMIT: Final = {"slurm": "sbatch", "pbs": "qsub"}
"""The command that a job is handed in with."""


class _Cluster(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(ge=1)
    """Jobs or pods."""
    cores: int = Field(ge=1)
    """Of each."""
    memory: str = Field(pattern=r"^[0-9.]+ ?[kMGT]i?B?$")
    """Of each, for example "48GB"."""


class JobCluster(_Cluster):
    """Jobs of a batch system, through dask-jobqueue."""

    kind: Literal["slurm", "pbs"]
    walltime: str = Field(pattern=r"^([0-9]+-)?[0-9]+:[0-9]{2}:[0-9]{2}$")
    """Longest time of a job, hours:minutes:seconds. A job that ends before the map is another's work: no sheet is lost."""
    queue: str | None = None
    """Queue or partition."""
    account: str | None = None
    interface: str | None = None
    """Network interface that the workers reach this machine by, for example "ib0"."""
    directives: tuple[str, ...] = ()
    """More directives of the job script, for example "--gres=gpu:1"."""
    prologue: tuple[str, ...] = ()
    """Lines of the job script before the worker, for example to activate an environment."""
    python: str | None = None
    """Python of the workers; default: this one."""
    log_folder: str | None = None
    """Folder for what the jobs print."""

    def options(self, resource: str) -> dict[str, Any]:
        """What dask-jobqueue takes for it; its workers offer one unit of `resource`."""
        given = {
            "queue": self.queue, "account": self.account, "interface": self.interface, "python": self.python,
            "log_directory": self.log_folder,
        }  # fmt: skip
        return {
            "cores": self.cores, "memory": self.memory, "processes": 1, "walltime": self.walltime,
            "job_extra_directives": [*self.directives],
            # dask gives a worker one thread for its arithmetic unless it is told otherwise.
            "job_script_prologue": [f"export OMP_NUM_THREADS={self.cores}", *self.prologue],
            "worker_extra_args": ["--resources", f"{resource}=1"],
            "scheduler_options": {"dashboard_address": ":0"},
            **{key: value for key, value in given.items() if value is not None},
        }  # fmt: skip


class PodCluster(_Cluster):
    """Pods of Kubernetes, through dask-kubernetes and its operator."""

    kind: Literal["kubernetes"]
    name: str = "canopy"
    namespace: str | None = None
    """Default: the current one."""
    image: str
    """Container image with canopy in it, for scheduler and workers."""
    gpus: int = Field(default=0, ge=0, le=1)
    """Of each worker."""
    volumes: dict[str, str] = {}
    """Persistent volume claim -> path where the pods see it."""
    environment: dict[str, str] = {}

    def spec(self, made: dict[str, Any], resource: str) -> dict[str, Any]:
        """The description of the cluster for the operator.

        Args:
            made: What `dask_kubernetes.operator.make_cluster_spec` makes of name, image and workers.
            resource: What each worker offers one unit of.
        """
        units = {"cpu": str(self.cores), "memory": self.memory.replace(" ", "").removesuffix("B")}
        limits = units | ({"nvidia.com/gpu": str(self.gpus)} if self.gpus else {})
        environment = {"OMP_NUM_THREADS": str(self.cores), **self.environment}
        for part in ("scheduler", "worker"):
            pod = made["spec"][part]["spec"]
            container = pod["containers"][0]
            container["env"] = [{"name": key, "value": value} for key, value in environment.items()]
            container["volumeMounts"] = [{"name": claim, "mountPath": path} for claim, path in self.volumes.items()]
            pod["volumes"] = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in self.volumes]
        worker = made["spec"]["worker"]["spec"]["containers"][0]
        worker["resources"] = {"requests": limits, "limits": limits}
        worker["args"] = [*worker["args"], "--nthreads", "2", "--resources", f"{resource}=1"]
        return made


class _Kind(BaseModel):
    """The key that says what the others may be."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["slurm", "pbs", "kubernetes"]


def read_cluster(path: Path) -> JobCluster | PodCluster:
    """The cluster that a file describes.

    Raises:
        ClusterError: it is missing, no TOML, or holds an unknown key or a wrong value.
    """
    kind = read_settings(path, _Kind, what="a cluster", error=ClusterError).kind
    if kind == "kubernetes":
        return read_settings(path, PodCluster, what="a cluster", error=ClusterError)
    return read_settings(path, JobCluster, what="a cluster", error=ClusterError)


@contextmanager
def start_cluster(path: Path, resource: str) -> Iterator[Any]:
    """Start the cluster that a file describes; it is gone when the block ends.

    Args:
        path: TOML.
        resource: What each worker offers one unit of.

    Yields:
        A dask cluster, to connect a client to. Its workers come when the batch system lets them.

    Raises:
        ClusterError: see `read_cluster`; the extra is not installed; or this machine cannot start such a cluster.
    """
    settings = read_cluster(path)
    made = _jobs(path, settings, resource) if isinstance(settings, JobCluster) else _pods(path, settings, resource)
    with made as cluster:
        if isinstance(settings, JobCluster):
            cluster.scale(jobs=settings.workers)
        yield cluster


def _jobs(path: Path, settings: JobCluster, resource: str) -> Any:
    try:
        import dask_jobqueue
    except ImportError as error:
        raise _lacking(path, settings.kind, "dask-jobqueue", "jobqueue") from error
    command = SUBMIT[settings.kind]
    if shutil.which(command) is None:
        raise ClusterError(
            f"{path} describes {settings.kind} jobs, and this machine has no {command}; run canopy where jobs are submitted"
        )
    kind: Any = getattr(dask_jobqueue, {"slurm": "SLURMCluster", "pbs": "PBSCluster"}[settings.kind])
    try:
        return kind(silence_logs=logging.CRITICAL, **settings.options(resource))
    except (ValueError, OSError, RuntimeError) as error:
        raise ClusterError(f"{path}: the cluster cannot be started ({' '.join(str(error).split())}); correct it") from error


def _pods(path: Path, settings: PodCluster, resource: str) -> Any:
    try:
        from dask_kubernetes.operator import KubeCluster, make_cluster_spec
    except ImportError as error:
        raise _lacking(path, settings.kind, "dask-kubernetes", "kubernetes") from error
    spec = settings.spec(make_cluster_spec(name=settings.name, image=settings.image, n_workers=settings.workers), resource)
    try:
        return KubeCluster(custom_cluster_spec=spec, namespace=settings.namespace, quiet=True)
    except Exception as error:  # whatever the client of Kubernetes raises without a cluster, a login or the operator
        raise ClusterError(
            f"{path}: Kubernetes does not start the cluster ({' '.join(str(error).split())}); check the login and that the "
            f"dask operator is installed"
        ) from error


def _lacking(path: Path, kind: str, package: str, extra: str) -> ClusterError:
    return ClusterError(
        f"{path} describes a cluster of kind {kind}, which needs {package}; install it with pip install "
        f"'canopy-height[{extra}]'"
    )
