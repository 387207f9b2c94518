"""Commands for a smart home and the actions they mean: generated ones to learn from, and readers of those of others."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HAND_WRITTEN = Path(__file__).with_name("home.jsonl")
# fmt: off
ROOMS = (
    "attic", "backyard", "balcony", "barn", "basement", "bathroom", "bedroom", "cellar", "closet",
    "conference room", "den", "dining room", "driveway", "entryway", "front door", "front porch", "game room",
    "garage", "garden", "greenhouse", "guest room", "gym", "hallway", "home theater", "kids room", "kitchen",
    "left bedroom", "library", "living room", "loft", "lower deck", "lobby", "main bedroom", "mud room",
    "nursery", "office", "olive tree", "pantry", "patio", "pool", "porch", "roof", "sauna", "shed", "staircase",
    "storage room", "studio", "sunroom", "terrace", "upstairs bathroom", "utility room", "vegetable garden",
    "wine room", "workshop",
)
# fmt: on
THINGS = {
    "light": ("light", "light", "light", "lights", "lamp", "ceiling light", "night light", "reading lamp"),
    "switch": ("outlet", "plug", "heater", "fountain", "coffee maker", "fireplace"),
    "fan": ("fan", "ceiling fan", "exhaust fan"),
    "cover": ("door", "gate", "blinds", "curtains", "shutters"),
    "climate": ("thermostat", "air conditioner", "heating"),
    "media_player": ("speaker", "tv", "smart speaker", "radio"),
    "valve": ("sprinklers", "water valve"),
}
ON = ("turn on the {}", "switch on the {}", "turn the {} on", "{} on", "can you switch the {} on", "start the {}")
OFF = ("turn off the {}", "switch off the {}", "turn the {} off", "{} off", "can you switch the {} off", "stop the {}")
# Action, domain, ways to say it: `{}` is a device, `{room}` a room, `{n}` a number.
SAYINGS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *(("HassTurnOn", domain, ON) for domain in THINGS if domain != "cover"),
    *(("HassTurnOff", domain, OFF) for domain in THINGS if domain != "cover"),
    ("HassTurnOn", "cover", ("open the {}", "{} open", "can you open the {}")),
    ("HassTurnOff", "cover", ("close the {}", "shut the {}", "can you close the {}")),
    (
        "HassLightSet",
        "light",
        (
            "set the {} to {n}% brightness",
            "dim the {} to {n}",
            "{} brightness {n}%",
            "set {} brightness to {n} percent",
        ),
    ),
    ("HassSetTemperature", "climate", ("set the {room} to {n} degrees", "make the {room} {n} degrees")),
    ("HassSetVolume", "media_player", ("set the volume of the {} to {n}", "{} volume {n}%", "set {} volume to {n}")),
    ("HassSetPosition", "cover", ("open the {} to {n} percent", "set the {} to {n}% open")),
    ("HassMediaPause", "media_player", ("pause the {}", "pause the music on the {}")),
    ("HassMediaUnpause", "media_player", ("unpause the {}", "continue playing on the {}", "resume the {}")),
    ("HassMediaNext", "media_player", ("next song on the {}", "play the next track on the {}", "skip on the {}")),
    ("HassMediaPrevious", "media_player", ("go back to the previous song on the {}", "play the last track on the {}")),
)
WITH_VALUE = ("HassLightSet", "HassSetTemperature", "HassSetVolume", "HassSetPosition")
WITHOUT = tuple(dict.fromkeys(action for action, _, _ in SAYINGS if action not in WITH_VALUE))
TENS = ("ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "one hundred")


@dataclass(frozen=True)
class Command:
    """What was said, the action that is meant, and the JSON schema of all actions that are possible there."""

    prompt: str
    action: dict[str, Any]
    schema: dict[str, Any]

    @property
    def answer(self) -> str:
        """The action as the model is to write it."""
        return json.dumps(self.action, ensure_ascii=False, separators=(",", ":"))


def generated(count: int, seed: int = 0) -> list[Command]:
    """Return commands drawn from ways to say things; the targets of all of them make up the home."""
    draw = random.Random(seed)
    drawn = [_one(draw) for _ in range(count)]
    schema = home_schema({action["target"] for _, action in drawn})
    return [Command(said, action, schema) for said, action in drawn]


def _one(draw: random.Random) -> tuple[str, dict[str, Any]]:
    action, domain, sayings = draw.choice(SAYINGS)
    room, thing, saying = draw.choice(ROOMS), draw.choice(THINGS[domain]), draw.choice(sayings)
    device = draw.choice((f"{room} {thing}", f"{room} {thing}", f"{room} {thing}", thing))
    spoken = f"{thing} in the {room}" if device != thing and draw.random() < 0.25 else device
    target = room if "{room}" in saying else device
    meant: dict[str, Any] = {"action": action, "domain": domain, "target": target.title()}
    number = ""
    if action in WITH_VALUE:
        value = draw.randrange(16, 29) if action == "HassSetTemperature" else draw.randrange(5, 101, 5)
        meant["value"] = value
        number = TENS[value // 10 - 1] if value % 10 == 0 and draw.random() < 0.4 else str(value)
    said = saying.format(spoken, room=room, n=number)
    said = draw.choice(("{}", "{}", "please {}", "{} please")).format(said)
    return draw.choice((said, said.capitalize())), meant


def home_schema(targets: set[str]) -> dict[str, Any]:
    """Return what a home can do: the devices and rooms it has are the only targets."""
    shared = {"domain": {"enum": list(THINGS)}, "target": {"enum": sorted(targets)}}
    common = {name: {"$ref": f"#/$defs/{name}"} for name in shared}
    plain = {"action": {"enum": list(WITHOUT)}, **common}
    value = {"type": "integer", "minimum": 0, "maximum": 100}
    valued = {"action": {"enum": list(WITH_VALUE)}, **common, "value": value}
    return {"$defs": shared, "anyOf": [_object(plain, list(plain)), _object(valued, list(valued))]}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def hand_written() -> list[Command]:
    """Return the commands that come with this example, written by hand in other words than the generated ones."""
    rows = [json.loads(line) for line in HAND_WRITTEN.read_text(encoding="utf-8").splitlines()]
    schema = home_schema({row["action"]["target"] for row in rows})
    return [Command(row["said"], row["action"], schema) for row in rows]


def home_assistant(path: Path) -> list[Command]:
    """Read conversation.jsonl of home-assistant-datasets: commands that are calls, each with the names in its home."""
    found = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        names = re.findall(r"^(?:- names|  areas): (.+)$", row["instructions"], re.MULTILINE)
        schema = home_schema({name.strip() for name in names})
        found += [Command(row["input"], _called(call), schema) for call in row.get("tool_calls", ())]
    return found


def _called(call: dict[str, str]) -> dict[str, Any]:
    """Return a call as an action: of its arguments what is in other homes too."""
    asked = json.loads(call["arguments"])
    domain = asked.get("domain") or next(domain for action, domain, _ in SAYINGS if action == call["name"])
    action = {"action": call["name"], "domain": domain if isinstance(domain, str) else domain[0]}
    values = [int(value) for value in asked.values() if isinstance(value, float)]
    return action | {"target": asked.get("name") or asked["area"]} | ({"value": values[0]} if values else {})


def snips(folder: Path) -> tuple[list[Command], list[Command]]:
    """Read snips' intents with their slots, what is learnt and what tests, as actions with optional arguments."""
    learning, test = ([*_snips(folder, pattern)] for pattern in ("train_*_full.json", "validate_*.json"))
    slots: dict[str, list[str]] = {}
    for _, intent, said in learning:
        slots[intent] = list(dict.fromkeys([*slots.get(intent, ()), *said]))
    schema = {
        "anyOf": [
            _object({"action": {"const": intent}, **{slot: {"type": "string"} for slot in names}}, ["action"])
            for intent, names in slots.items()
        ]
    }

    def commands(rows: list[tuple[str, str, dict[str, str]]]) -> list[Command]:
        return [
            Command(said, {"action": intent} | {slot: given[slot] for slot in slots[intent] if slot in given}, schema)
            for said, intent, given in rows
        ]

    return commands(learning), commands(test)


def _snips(folder: Path, pattern: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    for path in sorted(folder.glob(pattern)):
        for intent, requests in json.loads(path.read_text(encoding="utf-8", errors="replace")).items():
            for request in requests:
                parts = request["data"]
                said = "".join(part["text"] for part in parts).strip()
                yield said, intent, {part["entity"]: part["text"].strip() for part in parts if "entity" in part}
