"""What an import brings with it, which code a cache depends on, and what documents name."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
import yaml

from collapse.utils import source
from collapse.utils.files import ROOT
from collapse.utils.source import digest_of_code


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


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small one, whose one function is measured; change(file, old, new) edits a file of it."""
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms/__init__.py").touch()
    files = {
        "rooms/numbers.py": "SCALE = 2\n\n\ndef scaled(x):\n    return SCALE * x\n\n\n"
        "def unused(x):\n    return -x\n",
        "rooms/shapes.py": "from rooms import numbers\n\n\nclass Shape:\n    def size(self):\n"
        "        return numbers.scaled(1)\n",
        "rooms/plots.py": "COLOR = 'red'\n\n\ndef draw():\n    return COLOR\n",
        "entry_of_test.py": "from rooms import plots\nfrom rooms.shapes import Shape\n\n\n"
        'def measure():\n    """Says so."""\n    return Shape().size()\n\n\n'
        "def publish():\n    return plots.draw()\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "entry_of_test", raising=False)
    measure = importlib.import_module("entry_of_test").measure

    def change(file, old, new):
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new))
        source._module.cache_clear()
        return digest_of_code(measure)

    source._module.cache_clear()
    yield digest_of_code(measure), change
    source._module.cache_clear()


@pytest.mark.parametrize(
    ("file", "old", "new", "depends"),
    [
        ("rooms/numbers.py", "SCALE = 2", "SCALE = 3", True),
        ("rooms/numbers.py", "SCALE * x", "SCALE + x", True),
        ("rooms/shapes.py", "scaled(1)", "scaled(7)", True),
        ("entry_of_test.py", "return Shape", "return 2 * Shape", True),
        ("rooms/numbers.py", "return -x", "return +x", False),
        ("rooms/plots.py", "red", "blue", False),
        ("entry_of_test.py", "Says so.", "Says more.", False),
        ("rooms/numbers.py", "SCALE = 2", "SCALE = 2  # the scale", False),
        ("entry_of_test.py", "return plots.draw()", "return None", False),
    ],
)
def test_a_digest_follows_the_code_that_is_used_and_no_other(repository, file, old, new, depends):
    before, change = repository
    assert (change(file, old, new) != before) == depends


def test_what_experiment_4_measures_depends_on_the_models_and_not_on_plots_or_jobs(monkeypatch):
    analysis = importlib.import_module("effective_rank_analysis")
    before = digest_of_code(analysis.measure, analysis.models_of)
    whole = source._module

    def edited(module, name):
        def _module(path):
            definitions, imports = whole(path)
            if path == ROOT / module:
                assert name in definitions
                definitions = definitions | {name: [ast.parse("changed = True")]}
            return definitions, imports

        monkeypatch.setattr(source, "_module", _module)
        return digest_of_code(analysis.measure, analysis.models_of) != before

    for module, name in (
        ("collapse/measures/layers.py", "pool"),
        ("collapse/measures/neural_collapse.py", "length_share"),
        ("common.py", "evaluate"),
        ("experiment.py", "Layer"),
        ("collapse/measures/rank.py", "effective_rank"),
        ("collapse/data/batches.py", "token_budget_batches"),
        ("collapse/models/pretrained.py", "load_causal_lm"),
        ("collapse/training/checkpoints.py", "load_weights"),
    ):
        assert edited(module, name), name
    for module, name in (
        ("collapse/report/plots.py", "CLASS_COLORS"),
        ("collapse/report/rank_plots.py", "plot_layers"),
        ("collapse/report/records.py", "table"),
        ("collapse/runs/engine.py", "run_all"),
        ("common.py", "Trainer"),
        ("collapse/report/comparisons.py", "summary_table"),
    ):
        assert not edited(module, name), name


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
