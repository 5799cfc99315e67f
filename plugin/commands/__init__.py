"""The commands of the command line, one module each.

`run(args)` parses the arguments and does the work; `parser()` declares them, also for completion.
"""

COMMANDS = {
    "demo": "run the main job on the pictures and the model inside the package (3 minutes)",
    "train": "train SAEs at one or many hook points, then evaluate them and write the report",
    "evaluate": "measure trained SAEs against a class tree, each number beside its null controls",
    "atlas": "evaluate every published SAE of a model in one pass: which carries the tree, and where",
    "convert": "write another library's SAE file as an SAELens folder",
    "publish": "upload the SAEs of an evaluated run to the Hugging Face hub, with a model card",
    "report": "write report.html from the results of an evaluation",
    "list": "what a config can name: architectures, models, evaluators, taxonomies, presets",
    "completion": "print a script that completes all this on the tab key: bash, zsh, fish",
}
