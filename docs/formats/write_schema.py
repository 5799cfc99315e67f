"""Writes the JSON schema of results.json, and the tables of fields in results.md, from the types.

    python docs/formats/write_schema.py

Needs the extra `dev`. Run it after a change of the dataclasses or docstrings in
plugin/reporting/results.py; a test compares both files with them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from docstring_parser import parse
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from taxolens.plugin.reporting.results import JSON_SCHEMA, SCHEMA, Results

PAGE = Path(__file__).with_name("results.md")
BEGIN, END = "<!-- fields -->\n", "<!-- end of fields -->\n"


class ResultsSchema(GenerateJsonSchema):
    """Pydantic's schema of a dataclass, with descriptions from its docstring.

    A float may be null, which stands for an undefined number.
    """

    def float_schema(self, schema: Any) -> dict[str, Any]:
        return {"type": ["number", "null"]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def encode_default(self, default: Any) -> Any:
        undefined = isinstance(default, float) and math.isnan(default)
        return None if undefined else super().encode_default(default)

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        """Without `additionalProperties: true`, which says nothing and which only some versions of
        pydantic write."""
        found = super().dict_schema(schema)
        return {key: value for key, value in found.items() if value is not True}

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Raises KeyError: a field has no line under `Args:`."""
        found = super().dataclass_schema(schema)
        docstring = parse(schema["cls"].__doc__ or "")
        described = {item.arg_name: item.description for item in docstring.params}
        found["description"] = docstring.short_description
        for name, field in found["properties"].items():
            words = str(described[name]).split()
            field["description"] = " ".join("null" if w == "None" else w for w in words)
        return found


def results_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of results.json.

    Fields that it does not name are allowed, as a later version of taxolens may add some.
    """
    schema = TypeAdapter(Results).json_schema(schema_generator=ResultsSchema)
    fields = schema["properties"]
    del fields["folder"]
    described = fields.pop("schema")["description"]
    schema["properties"] = {"schema": {"const": SCHEMA, "description": described}, **fields}
    schema["required"].insert(0, "schema")
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def page_of(schema: dict[str, Any], page: str) -> str:
    """The text of results.md with its tables of fields made anew."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    objects = {"Results": schema, **schema["$defs"]}
    names = list(dict.fromkeys(["Results", *_named(schema["properties"], objects)]))
    tables = [_table(name, objects[name]) for name in names]
    return before + BEGIN + "\n" + "\n".join(tables) + "\n" + END + after


def _named(schema: Any, objects: dict[str, Any]) -> list[str]:
    """The objects that a schema refers to, and those that they refer to, in order."""
    found = []
    for reference in re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)):
        found += [reference, *_named(objects[reference]["properties"], objects)]
    return found


def _table(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{field}` | {_type(facts)} | {'yes' if field in required else 'no'} "
        f"| {facts['description']} |"
        for field, facts in schema["properties"].items()
    ]
    head = ["| field | type | required | meaning |", "|---|---|---|---|"]
    return "\n".join([f"### {name}", "", schema["description"], "", *head, *rows, ""])


def _type(schema: dict[str, Any]) -> str:
    """A type in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if isinstance(schema.get("type"), list):
        return " or ".join(schema["type"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    below = schema.get("additionalProperties")
    if isinstance(below, dict):
        return f"object of {_type(below)}"
    return {"string": "text", "boolean": "bool"}.get(schema["type"], schema["type"])


if __name__ == "__main__":
    schema = results_schema()
    JSON_SCHEMA.write_text(json.dumps(schema, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    PAGE.write_text(page_of(schema, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(JSON_SCHEMA, PAGE, sep="\n")
