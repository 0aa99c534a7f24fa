"""Writes packages named galore_torch and q_galore_torch that are this one: python -m qgalore.shim DIR

With DIR on the path, code that imports the packages runs on this one unchanged, transformers' `optim="galore_adamw"`
and its kin included. Nothing is installed and nothing else is touched: delete the two folders to undo it.
"""

import argparse
import sys
from pathlib import Path

MARK = "# Written by python -m qgalore.shim: the names of another package for qgalore.compat.\n"
FILES = {
    "galore_torch/__init__.py": "GaLoreAdafactor GaLoreAdamW GaLoreAdamW8bit GaLoreLion",
    "q_galore_torch/__init__.py": "QGaLoreAdamW8bit QGaLoreAdamW8bit_simulate",
    "q_galore_torch/utils/__init__.py": "",
    "q_galore_torch/utils/quantization.py": "QGaLoreLinear prepare_model_for_int8_training",
    "q_galore_torch/utils/simulate_quantization.py": "QLinear prepare_model_for_int8_training_simulation",
    "q_galore_torch/utils/setup.py": "load_model_weight saving_model_weight",
}


def write(folder: Path) -> list[Path]:
    """Writes the packages into a folder, which may not exist yet. Returns the two packages' folders.

    Raises FileExistsError, before anything is written, if a package of the same name is there that is not ours.
    """
    packages = sorted({folder / name.split("/")[0] for name in FILES})
    for package in packages:
        first = package / "__init__.py"
        if package.exists() and not (first.is_file() and first.read_text().startswith(MARK)):
            raise FileExistsError(f"{package} exists and was not written by qgalore.shim: choose another folder")
    for name, names in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MARK + _source(names.split()))
    return packages


def _source(names: list[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(names)
    return f"from qgalore.compat import {listed}\n\n__all__ = {names}\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 2, after one line on stderr, for what the user can repair."""
    parser = argparse.ArgumentParser(prog="python -m qgalore.shim", description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="where the packages galore_torch and q_galore_torch go"
    )
    folder = parser.parse_args(argv).folder
    try:
        packages = write(folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {' and '.join(map(str, packages))}. To use them: export PYTHONPATH={folder.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
