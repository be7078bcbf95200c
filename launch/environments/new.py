"""`bm3il new-environment`: a small environment that works, as a package of its own to begin with."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically
from bm3il.protocol.registry import known_environments

TEMPLATE = Path(__file__).parent / "template"
NAME, CLASS = "my_town", "MyTown"
"""What is called so in the template."""
FOLDER = "-environment"
"""After the name: beside a folder of just that name, Python would import that in place of what is inside."""


def new_environment(name: str, folder: Path | None) -> int:
    """Write the package of an environment of that name into a new folder. Raises InputError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise InputError(f"expected a name of small letters, digits and _, like my_town, got '{name}'")
    if name in known_environments() or name in sys.stdlib_module_names or name == "bm3il":
        raise InputError(f"'{name}' is the name of something else already; take another")
    folder = folder or Path(f"{name}{FOLDER}")
    if folder.exists():
        raise InputError(f"{folder} exists already; name another --folder, or delete it")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}") from error
    called = {NAME: name, CLASS: "".join(word.capitalize() for word in name.split("_"))}
    for source in sorted(TEMPLATE.glob("*.*")):
        text = source.read_text(encoding="utf-8")
        for old, new in called.items():
            text = text.replace(old, new)
        write_atomically(folder / source.name.replace(NAME, name), text)
    print(f"{folder}/{name}.py is an environment that works. Next:")
    print(f"  pip install -e {folder if folder.is_absolute() else f'./{folder}'} pytest && python -m pytest {folder}")
    print(f"  bm3il check-environment {name}")
    return 0
