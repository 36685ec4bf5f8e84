"""Rules of the house that a machine can check: who imports whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("activations", "sae", "features", "app")  # each may import those before it
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    assert not imported(path) & set(FLOORS[floor + 1 :])


def test_no_explorer_module_bears_the_name_of_a_package() -> None:
    """Streamlit puts the pages' folder first on the path: a page named sae.py would hide the package."""
    names = {path.stem for path in (ROOT / "app" / "explorer").glob("*.py")}
    assert not names & {
        *FLOORS,
        *sys.stdlib_module_names,
        "torch",
        "numpy",
        "plotly",
        "streamlit",
        "rich",
        "tyro",
    }


def test_packages_import_nothing_heavy() -> None:
    code = "import activations, sae, features, app, sae.config, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "transformer_lens", "streamlit", "numpy"} & set(done.stdout.split())


def test_public_functions_have_docstrings() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []
