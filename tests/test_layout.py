"""What an import brings with it, which files a cache depends on, and what documents name."""

import os
import re
import subprocess
import sys

import yaml

import effective_rank_analysis
from collapse.utils.files import ROOT


def test_measures_are_imported_without_the_libraries_that_few_of_them_need():
    """And importing them sets nothing in the environment."""
    barred = ["scipy", "sklearn", "matplotlib", "transformers", "peft", "datasets", "tyro"]
    code = "import importlib, os, pkgutil, sys\nbefore = dict(os.environ)\n"
    code += f"sys.modules.update(dict.fromkeys({barred}))\n"  # None: an import of it fails
    code += "from collapse import measures\nfor found in pkgutil.iter_modules(measures.__path__):\n"
    code += "    importlib.import_module(f'collapse.measures.{found.name}')\n"
    code += "assert before == dict(os.environ)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_starts_jobs_is_imported_without_torch():
    """Which takes seconds in every worker, and not every job needs it."""
    code = "import sys\nsys.modules['torch'] = None\nimport collapse.runs.engine"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_experiment_4_keeps_depends_on_the_code_that_measures_and_not_on_plots_or_jobs():
    files = {str(file.relative_to(ROOT)) for file in effective_rank_analysis.files_that_measure()}
    for name in (
        "collapse/measures/layers.py",
        "collapse/models/pretrained.py",
        "collapse/data/batches.py",
        "collapse/training/evaluation.py",
        "collapse/training/checkpoints.py",
        "experiment.py",
        "common.py",
    ):
        assert name in files
    assert not [name for name in files if "plots" in name or name.startswith("collapse/runs")]
    assert all((ROOT / name).is_file() for name in files)


def test_readme_names_files_that_exist():
    for name in re.findall(
        r"`((?:collapse|studies|tests)/[\w./]+\.\w+)`", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / name).exists(), name


def test_the_form_for_runs_by_others_is_one_and_the_readme_links_it():
    file = ".github/ISSUE_TEMPLATE/7b-run.yml"
    form = yaml.safe_load((ROOT / file).read_text())
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["id"] and field["attributes"]["label"] for field in fields)
    assert f"({file})" in (ROOT / "README.md").read_text()


def test_the_workflow_runs_what_is_there_on_the_oldest_and_the_newest_python():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    limits = re.search(r"\((3, \d+)\) <= .* <= \((3, \d+)\)", (ROOT / "Makefile").read_text())
    taken = [limit.replace(", ", ".") for limit in limits.groups()]
    assert job["strategy"]["matrix"]["python-version"] == taken
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands and all(os.access(ROOT / command, os.X_OK) for command in commands)


def test_the_citation_has_the_title_of_the_readme_and_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f"# {citation['title']}" == (ROOT / "README.md").read_text().partition("\n")[0]
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert citation["license"] in (ROOT / "LICENSE").read_text().partition("\n")[0]
    assert all(author["name"] for author in citation["authors"])
