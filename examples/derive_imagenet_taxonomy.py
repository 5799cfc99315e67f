"""Derive registry/taxonomies/data/imagenet.json from the WordNet 3.0 database.

    apt install wordnet-base                        # the database: /usr/share/wordnet
    pip download timm --no-deps && unzip -p timm-*.whl timm/data/_info/imagenet_synsets.txt > synsets.txt
    python examples/derive_imagenet_taxonomy.py --wordnet /usr/share/wordnet --synsets synsets.txt

`--synsets` lists synset ids such as n01440764, one a line, in the order of the labels. The result
holds every node above them: its words and its hypernyms (`@` pointers; the instance
hypernyms `@i` are left out). In WordNet 3.0 the digits of an ImageNet synset id are the byte offset
of the synset in data.noun (format: https://wordnet.princeton.edu/documentation/wndb5wn).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "registry" / "taxonomies" / "data" / "imagenet.json"


def read_synset(noun_data: bytes, synset: str) -> tuple[str, list[str]]:
    """The words of a noun synset, joined by commas, and the ids of its hypernyms."""
    offset = int(synset[1:])
    line = noun_data[offset : noun_data.index(b"\n", offset)].decode()
    fields = line.split(" | ")[0].split()
    if fields[0] != synset[1:] or fields[2] != "n":
        raise SystemExit(f"{synset}: no noun starts at this offset; is this WordNet 3.0?")
    n_words = int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * n_words : 2]]
    pointers = fields[5 + 2 * n_words :]
    hypernyms = [
        f"n{pointers[i + 1]}" for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@"
    ]
    return ", ".join(words), hypernyms


def closure(noun_data: bytes, synsets: list[str]) -> dict[str, tuple[str, list[str]]]:
    """`read_synset` of every given synset and of everything above it, sorted by id."""
    found: dict[str, tuple[str, list[str]]] = {}
    waiting = list(synsets)
    while waiting:
        synset = waiting.pop()
        if synset not in found:
            found[synset] = read_synset(noun_data, synset)
            waiting.extend(found[synset][1])
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--synsets", type=Path, required=True, help="synset ids, one a line")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()

    classes = args.synsets.read_text().split()
    nodes = closure((args.wordnet / "data.noun").read_bytes(), classes)
    lines = ",\n".join(
        f"  {json.dumps(synset)}: {json.dumps([words, hypernyms], ensure_ascii=False)}"
        for synset, (words, hypernyms) in nodes.items()
    )
    args.output.write_text(
        f'{{"source": "WordNet 3.0, see WORDNET-LICENSE.txt",\n'
        f' "classes": {json.dumps(classes)},\n "nodes": {{\n{lines}\n }}\n}}\n'
    )
    print(f"{args.output}: {len(classes)} classes, {len(nodes)} nodes")


if __name__ == "__main__":
    main()
