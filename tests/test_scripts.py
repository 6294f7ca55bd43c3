"""The shell scripts: which Python they take, what they say without one, and an environment that broke off."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "run_c2i_train.sh": ["--beta", "0"],
    "run_t2i_train.sh": ["--beta", "0"],
    "test.sh": ["base", "cpu", "0", "2.0"],
    "benchmark/geneval/eval.sh": ["."],
}
ECHO = '#!/bin/sh\necho "this is $0, patience $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\n'
# Makes .venv/bin/python, which has pip if ENSUREPIP is set, as python3.11 does without and with its venv package.
BASE_PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
[ -e "$3/bin/python" ] || printf '#!/bin/sh\\n[ -e "%s/has_pip" ]\\n' "$3" >"$3/bin/python"
chmod +x "$3/bin/python"
[ -n "$ENSUREPIP" ] && : >"$3/has_pip"
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """The scripts alone, in a folder of their own."""
    folder = tmp_path / "project"
    for name in (*SCRIPTS, "benchmark/launch.sh", ".ci/python.sh", ".ci/environment.sh", "requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def executable(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return path


def bash(project: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run bash in the project, without what the caller's own environment would say about Python."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "BASE_PYTHON")}
    inherited.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", None)
    environment = {**inherited, "NUM_PROCESSES": "1", **environment}
    return subprocess.run(["bash", *command], cwd=project, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_take_the_callers_python_else_the_quickstarts_else_the_paths(project, tmp_path, script):
    on_path = executable(tmp_path / "bin/python", ECHO)
    path = f"{on_path.parent}:{os.environ['PATH']}"

    def taken(**environment):
        called = bash(project, script, *SCRIPTS[script], PATH=path, **environment)
        assert called.returncode == 0, called.stderr
        return project / called.stdout.removeprefix("this is ").partition(",")[0]  # may be relative

    assert taken() == on_path
    made = executable(project / ".venv/bin/python", ECHO)
    assert taken() == made
    mine = executable(tmp_path / "my own/python", ECHO)
    assert taken(PYTHON=str(mine)) == mine


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_torch_is_one_line_that_says_what_to_do(project, tmp_path, script):
    bare = executable(tmp_path / "bare", "#!/bin/sh\nexit 1\n")
    called = bash(project, script, *SCRIPTS[script], PYTHON=str(bare))
    assert (called.returncode, called.stdout, called.stderr.count("\n")) == (1, "", 1)
    assert called.stderr.startswith(f"error: {bare} has no torch: run bash quickstart.sh")
    assert "pip install -r requirements.txt" in called.stderr


def test_geneval_stays_in_the_callers_folder_so_that_relative_paths_mean_what_they_say(project, tmp_path):
    python = '#!/bin/sh\necho "$PWD|$PYTHONPATH|$CUDA_VISIBLE_DEVICES|$*"\n'
    executable(project / ".venv/bin/python", python)
    mine = tmp_path / "mine"
    mine.mkdir()
    script = "../project/benchmark/geneval/eval.sh"

    def called(*arguments, **environment):
        done = bash(mine, script, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split("|")

    options = ["--detections", "found.jsonl", "--out", "out"]
    words = f"-m benchmark.geneval images --device cuda {' '.join(options)}"  # an error where there is no GPU
    assert called("images", "1", *options, PYTHONPATH="") == [str(mine), str(project), "1", words]
    assert called("images", "cpu", PYTHONPATH="/a")[1:] == [f"{project}:/a", "", "-m benchmark.geneval images"]
    assert called("images")[2] == "0"


def test_geneval_started_elsewhere_runs_this_project_and_finds_its_own_object_names(tmp_path):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark/__init__.py").write_text("raise RuntimeError('the caller has a package of this name')")
    done = bash(tmp_path, str(ROOT / "benchmark/geneval/eval.sh"), "images", "cpu", PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no image under images: expected images/00000/samples/0000.png and so on\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "usage: bash eval.sh IMAGES [GPU_RANK]"),
        (["--detections", "found.jsonl"], "usage: bash eval.sh IMAGES [GPU_RANK]"),
        (["images", "--out", "out"], "error: GPU_RANK '--out': it takes a GPU (0) or cpu, before any option"),
        (["images", "0,1"], "error: GPU_RANK '0,1': it takes a GPU (0) or cpu"),
        (["images", "cuda"], "error: GPU_RANK 'cuda': it takes a GPU (0) or cpu"),
    ],
)
def test_geneval_refuses_what_is_no_gpu(project, arguments, words):
    executable(project / ".venv/bin/python", ECHO)
    done = bash(project, "benchmark/geneval/eval.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(words)


@pytest.mark.parametrize("script", ["run_c2i_train.sh", "run_t2i_train.sh"])
def test_training_may_finish_its_step_before_torchrun_kills_it(project, script):
    executable(project / ".venv/bin/python", ECHO)
    assert bash(project, script).stdout.endswith("patience 3600\n")
    assert bash(project, script, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60").stdout.endswith("patience 60\n")


@pytest.fixture
def install(project, tmp_path):
    """`install(**environment)`: source .ci/environment.sh with a Python whose venv module may lack pip."""
    base = executable(tmp_path / "base_python", BASE_PYTHON)

    def run(**environment):
        command = 'set -euo pipefail; source .ci/environment.sh; echo "$PYTHON"'
        return bash(project, "-c", command, BASE_PYTHON=str(base), **environment)

    return run


def test_an_environment_without_pip_is_made_again(install, project):
    for _ in range(2):  # python3.11 -m venv leaves bin/python behind when it fails
        failed = install(ENSUREPIP="")
        assert failed.returncode == 1 and "cannot make .venv: install its venv module" in failed.stderr
    executable(project / ".venv/bin/python", "#!/bin/sh\n[ -e .venv/has_pip ]\n")  # of an attempt that was killed
    made = install(ENSUREPIP="1")
    assert (made.returncode, made.stdout.split()[-1]) == (0, ".venv/bin/python")


def test_an_environment_is_kept_in_step_where_there_is_shasum_only(install, project, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "cat", "chmod", "cut", "mkdir", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    digest = hashlib.sha256((project / "requirements.txt").read_bytes()).hexdigest()
    # as macOS has it: shasum -a 256 FILE
    executable(tools / "shasum", f'#!/bin/sh\n[ "$1 $2 $3" = "-a 256 requirements.txt" ] && echo "{digest}  $3"\n')
    made = install(ENSUREPIP="1", PATH=str(tools))
    assert made.returncode == 0, made.stderr
    assert (project / ".venv/.requirements.sha256").read_text() == f"{digest}\n"
