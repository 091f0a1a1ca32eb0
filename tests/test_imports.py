"""Imports as a command makes them, in a process of their own."""

import importlib.metadata
import json
import subprocess
import sys

from medlora.cli.imports import _distributions

SCRIPT = """
import gc, importlib.metadata, json, sys
before = importlib.metadata.packages_distributions, sys.getswitchinterval()
from medlora.cli.imports import HIDDEN, importing
with importing():
    from medlora.train import run
import transformers.models as models
from transformers.utils import import_utils
found = import_utils.define_import_structure(models.__file__)
searched = type(models)(models.__name__, models.__file__, found, module_spec=models.__spec__)
hidden = [name for name in HIDDEN if name in sys.modules]
import scipy
from transformers import LlamaForCausalLM
print(json.dumps({
    "hidden": hidden,
    "models": len(models._class_to_module),
    "as searched": models._class_to_module == searched._class_to_module,
    "put back": before == (importlib.metadata.packages_distributions, sys.getswitchinterval()) and gc.isenabled(),
    "scipy": bool(scipy.__version__),
}))
"""


def test_imports_leave_out_what_is_not_needed_and_know_the_same_models() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("models") > 1000
    assert found == {"hidden": [], "as searched": True, "put back": True, "scipy": True}


def test_distributions_are_those_that_python_finds() -> None:
    found = _distributions()
    for name, distributions in importlib.metadata.packages_distributions().items():
        assert set(distributions) <= set(found[name]), name
    assert "numpy" in found["numpy"] and not any("." in name for name in found)
