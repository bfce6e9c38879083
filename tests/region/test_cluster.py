"""Clusters that a TOML file describes: what it may say, and jobs handed to a batch system, which here is a shell script."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

from canopy.errors import ClusterError
from canopy.region import map_region
from canopy.region.cluster import JobCluster, PodCluster, read_cluster, start_cluster
from tests.region.conftest import SHEET_PX, content

SLURM = 'kind = "slurm"\nworkers = 2\ncores = 1\nmemory = "2GB"\nwalltime = "00:30:00"\n'
PODS = 'kind = "kubernetes"\nworkers = 3\ncores = 4\nmemory = "16 GiB"\nimage = "canopy:1"\n'


def toml(folder, text):
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_what_a_file_may_say(tmp_path):
    text = SLURM + 'queue = "gpu"\ndirectives = ["--gres=gpu:1"]\nprologue = ["module load cuda"]\n'
    jobs = read_cluster(toml(tmp_path, text))
    assert isinstance(jobs, JobCluster)
    options = jobs.options("GPU")
    assert options["worker_extra_args"] == ["--resources", "GPU=1"]
    assert options["job_script_prologue"] == ["export OMP_NUM_THREADS=1", "module load cuda"]
    assert "account" not in options, "what is not said is left to dask-jobqueue's own settings"
    assert isinstance(read_cluster(toml(tmp_path, PODS)), PodCluster)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'kind' is missing"),
        ('kind = "slrm"', "kind: Input should be 'slurm', 'pbs' or 'kubernetes', not 'slrm'"),
        (SLURM.replace("workers", "worker"), "unknown key 'worker'; did you mean 'workers'?"),
        (SLURM.replace("workers = 2", "workers = 0"), "workers: .*greater than or equal to 1, not 0"),
        (SLURM.replace("2GB", "much"), "memory: .*not 'much'"),
        (SLURM.replace("00:30:00", "long"), "walltime: .*not 'long'"),
        (PODS.replace('image = "canopy:1"\n', ""), "key 'image' is missing"),
        ("= =", "is no TOML file"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, text, words):
    with pytest.raises(ClusterError, match=words) as error:
        read_cluster(toml(tmp_path, text))
    assert "\n" not in str(error.value)
    with pytest.raises(ClusterError, match="does not exist; give the path of a cluster"):
        read_cluster(tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("module", "extra", "text"), [("dask_jobqueue", "jobqueue", SLURM), ("dask_kubernetes.operator", "kubernetes", PODS)]
)
def test_an_extra_that_is_not_installed(tmp_path, monkeypatch, module, extra, text):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ClusterError, match=rf"install it with pip install 'canopy-height\[{extra}\]'"),
        start_cluster(toml(tmp_path, text), "GPU"),
    ):
        pass


def test_jobs_where_none_can_be_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ClusterError, match="has no sbatch; run canopy where jobs are submitted"),
        start_cluster(toml(tmp_path, SLURM), "GPU"),
    ):
        pass


def test_pods_have_the_volumes_and_one_gpu_a_worker(tmp_path):
    text = PODS + 'gpus = 1\n[volumes]\nforest = "/shared"\n'
    pods = read_cluster(toml(tmp_path, text))
    container = {"name": "c", "args": ["dask-worker"], "resources": None}
    made = {"spec": {part: {"spec": {"containers": [dict(container)]}} for part in ("worker", "scheduler")}}
    spec = pods.spec(made, "GPU")["spec"]
    worker, scheduler = (spec[part]["spec"]["containers"][0] for part in ("worker", "scheduler"))
    assert worker["args"] == ["dask-worker", "--nthreads", "2", "--resources", "GPU=1"]
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert scheduler["resources"] is None, "the scheduler needs no GPU"
    for part in ("worker", "scheduler"):
        assert spec[part]["spec"]["volumes"] == [{"name": "forest", "persistentVolumeClaim": {"claimName": "forest"}}]
        assert spec[part]["spec"]["containers"][0]["volumeMounts"] == [{"name": "forest", "mountPath": "/shared"}]


@pytest.mark.slow
def test_jobs_of_a_batch_system(image, tiny_model, whole, tmp_path, monkeypatch):
    """sbatch runs the job at once, in the background, and scancel ends it: the workers are real processes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "sbatch": """
            #!/bin/bash
            cp "$1" "$JOBS/script.$$"
            setsid bash "$JOBS/script.$$" > "$JOBS/log.$$" 2>&1 < /dev/null &
            echo "Submitted batch job $!"
        """,
        "scancel": """
            #!/bin/bash
            echo "$1" >> "$JOBS/cancelled"
            kill -- "-$1" 2> /dev/null
            exit 0
        """,
    }.items():
        (programs / name).write_text(textwrap.dedent(text).lstrip())
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    map_region(
        imagery=image, model=tiny_model, out=tmp_path / "out", sheet_px=SHEET_PX,
        cluster=toml(tmp_path, SLURM + 'directives = ["--gres=gpu:1"]\ninterface = "lo"\n'),
    )  # fmt: skip
    assert content(tmp_path / "out") == whole
    scripts = [path.read_text() for path in tmp_path.glob("script.*")]
    assert len(scripts) == 2
    assert all("#SBATCH --gres=gpu:1" in script and "--resources MODEL=1" in script for script in scripts)
    assert len((tmp_path / "cancelled").read_text().splitlines()) == 2
