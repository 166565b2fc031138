"""The notebook runs on the committed results, and is committed without outputs."""

import nbclient
import nbformat

from collapse.utils.files import ROOT


def test_the_notebook_draws_its_two_figures_from_the_committed_results():
    notebook = nbformat.read(ROOT / "notebooks/look.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)
    place = {"metadata": {"path": ROOT / "notebooks"}}
    nbclient.NotebookClient(notebook, timeout=120, resources=place).execute()
    shown = [output for cell in code for output in cell.outputs if output.output_type != "stream"]
    assert ["image/png" in output.data for output in shown] == [True, True]
