"""Which files of a folder are meant: a suffix tells the format, and what is inside tells the role.

MATSim writes configurations, change events and experienced plans beside its network and plans; collections of TNTP
files hold several networks, flows and trips of several hours.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bm3il.actors.environments.berlin.packed import unpacked
from bm3il.protocol.errors import InputError, unknown_name

SUFFIX = re.compile(r"\.(xml|tntp)(\.gz|\.zst)?$", re.IGNORECASE)
ROOTS = {"network": "network", "plans": "trips", "population": "trips", "facilities": "places"}
"""What MATSim's root elements mean here."""
ROLE_WORDS = {
    **dict.fromkeys(("network", "net"), "network"),
    **dict.fromkeys(("plans", "population", "trips"), "trips"),
    **dict.fromkeys(("facilities", "nodes", "node"), "places"),
}
ROLE_WORD = re.compile(rf"(.*)({'|'.join(ROLE_WORDS)})", re.IGNORECASE)
NETWORK_TAG = re.compile(r"^\s*<\s*(number of links|first thru node)\s*>", re.IGNORECASE | re.MULTILINE)
ORIGIN = re.compile(r"^\s*origin\b", re.IGNORECASE | re.MULTILINE)
START_BYTES = 1 << 16


@dataclass(frozen=True)
class Sources:
    """Files of one format, "matsim" or "tntp", that belong together. places: of facilities or nodes, or None."""

    format: str
    network: Path
    trips: Path
    places: Path | None


def find_sources(folder: Path, network: str = "", trips: str = "") -> Sources:
    """The network and the trips of a folder, and what tells the places of them.

    network, trips: files to take, in the folder or anywhere; without them the one pair of a format that there is, or
    that has one name (A_net, A_trips). Raises InputError, naming the files, if there is none, or more than one.
    """
    try:
        files = [file for file in sorted(folder.iterdir()) if SUFFIX.search(file.name) and file.is_file()]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    roles = {file: _probable_role(file) for file in files}
    networks = [_named(folder, network, "network", roles)] if network else _of_role(roles, "network")
    demands = [_named(folder, trips, "trips", roles)] if trips else _of_role(roles, "trips")
    pairs = [(a, b) for a in networks for b in demands if roles[a][0] == roles[b][0]]
    if len(pairs) > 1:
        pairs = [pair for pair in pairs if _stem(pair[0]) == _stem(pair[1])] or pairs
    if not pairs:
        raise InputError(f"{folder} {_what_is_missing(networks, demands)}")
    if len(pairs) > 1:
        listed = "; ".join(f"{a.name} and {b.name}" for a, b in pairs)
        raise InputError(f"{folder} holds more than one network with trips ({listed}): name --network and --plans")
    (chosen, demand), style = pairs[0], roles[pairs[0][0]][0]
    places = [file for file in _of_role(roles, "places") if roles[file][0] == style]
    return Sources(style, chosen, demand, _one_of(places, chosen))


def _probable_role(path: Path) -> tuple[str, str]:
    """Format and role. What cannot be read has the role of its name, so that whoever needs it says what is wrong."""
    try:
        return _role(path)
    except InputError:
        return _format(path), _role_by_name(path)


def _role(path: Path) -> tuple[str, str]:
    with unpacked(path) as file:
        if _format(path) == "tntp":
            start = file.read(START_BYTES).decode("utf-8", errors="replace")
            by_content = {"trips": ORIGIN, "network": NETWORK_TAG}
            found = (role for role, sign in by_content.items() if sign.search(start))
            return "tntp", next(found, _role_by_name(path))
        parser: Any = ElementTree.XMLPullParser(("start",))
        try:
            while data := file.read(START_BYTES):
                parser.feed(data)
                for _, root in parser.read_events():
                    return "matsim", ROOTS.get(root.tag, f"<{root.tag}>")
        except ElementTree.ParseError as error:
            raise InputError(f"{path}: expected a MATSim XML file: {error}") from error
    raise InputError(f"{path}: expected a MATSim XML file: it has no element")


def _format(path: Path) -> str:
    return "tntp" if ".tntp" in path.name.lower() else "matsim"


def _role_by_name(path: Path) -> str:
    word = ROLE_WORD.match(path.name)
    return ROLE_WORDS[word[2].lower()] if word else "something else"


def _of_role(roles: dict[Path, tuple[str, str]], role: str) -> list[Path]:
    return [file for file, (_, found) in roles.items() if found == role]


def _named(folder: Path, name: str, role: str, roles: dict[Path, tuple[str, str]]) -> Path:
    """The file that an option names; its role is added to `roles`."""
    path = next((path for path in (folder / name, Path(name)) if path.is_file()), None)
    if path is None:
        raise unknown_name("file", name, [file.name for file in roles])
    if path not in roles:
        roles[path] = _role(path)
    if roles[path][1] != role:
        raise InputError(f"{path} holds no {role}: it is {roles[path][1]}")
    return path


def _one_of(places: list[Path], network: Path) -> Path | None:
    if len(places) > 1:
        places = [file for file in places if _stem(file) == _stem(network)] or places
    if len(places) > 1:
        listed = ", ".join(file.name for file in places)
        raise InputError(f"{network.parent}: which of {listed} goes with {network.name}? Leave one of them there")
    return places[0] if places else None


def _stem(path: Path) -> str:
    """A name without suffix and the last word that tells a role: what the files of one network have in common."""
    return ROLE_WORD.sub(r"\1", SUFFIX.sub("", path.name), count=1).lower()


def _what_is_missing(networks: list[Path], demands: list[Path]) -> str:
    if networks or demands:
        found, missing = ("a network", "trips") if networks else ("trips", "network")
        return (
            f"holds {found} ({(networks or demands)[0].name}) and no {missing} of its format: MATSim's are called "
            "network.xml.gz and plans.xml.gz, TNTP's NAME_net.tntp and NAME_trips.tntp"
        )
    return (
        "holds neither a MATSim network and plans (network.xml.gz, plans.xml.gz) "
        "nor TNTP files (NAME_net.tntp, NAME_trips.tntp) nor a town's tables (locations.csv, transitions.csv)"
    )
