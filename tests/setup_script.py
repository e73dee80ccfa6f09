"""setup.py as a module, for tests of what it decides and of the flags it compiles with."""

import importlib.util
from pathlib import Path


def load():
    spec = importlib.util.spec_from_file_location("setup_script_of_dbkernels", Path(__file__).parents[1] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
