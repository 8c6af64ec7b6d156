"""Importing llmfast: cheap, complete under dir(), and right from any folder."""

import os
import subprocess
import sys

import llmfast


def run_python(code: str, folder: os.PathLike[str]) -> str:
    """Run code in a new process that finds llmfast as it is installed; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_dir_lists_the_public_names():
    assert dir(llmfast) == sorted([*llmfast.__all__, "__version__"])
    assert all(getattr(llmfast, name) is not None for name in dir(llmfast))


def test_importing_loads_neither_torch_nor_triton(tmp_path):
    code = "import sys, llmfast; print({'torch', 'triton', 'transformers'} & set(sys.modules))"
    assert run_python(code, tmp_path) == "set()"


def test_a_folder_beside_the_script_does_not_hide_the_package(tmp_path):
    """`git clone` makes a folder `llmfast`, which Python takes for a namespace package."""
    (tmp_path / "llmfast" / "llmfast").mkdir(parents=True)
    (tmp_path / "llmfast" / "llmfast" / "__init__.py").touch()
    assert run_python("import llmfast; print(llmfast.__version__)", tmp_path) == llmfast.__version__
