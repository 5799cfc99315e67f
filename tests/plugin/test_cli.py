import contextlib
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import simple_parsing.docstring
import tqdm
from PIL import Image
from results_factory import make_results
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from taxolens.plugin import builtin, cli
from taxolens.plugin.commands import (
    demo,
    evaluate,
    quick_check,
    report,
    shell,
    train,
    train_flags,
)
from taxolens.plugin.commands import list as list_command
from taxolens.plugin.reporting.metric_table import summary_rows
from taxolens.plugin.study.demo import run_demo
from taxolens.registry.errors import ConfigError, DataError
from taxolens.registry.presets import PRESETS
from taxolens.registry.table import ARCHITECTURES, EVALUATORS, TAXONOMIES

TREE = "parent,child\nthing,animal\nthing,plant\nanimal,cat\nanimal,dog\nplant,oak\nplant,rose\n"
CLASSES = ("cat", "dog", "oak", "rose")
COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "atlas",
    "convert",
    "publish",
    "report",
    "list",
    "completion",
)


@pytest.fixture
def taxolens(capsys):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*args):
        code = cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def failing(monkeypatch):
    """Lets `taxolens list` fail with an error of one's choice."""

    def fail_with(error):
        def kind():
            raise error

        monkeypatch.setitem(list_command.KINDS, "presets", kind)

    return fail_with


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Four classes of noise, told apart by colour, in a train and a validation split."""
    folder = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    for split, n in (("train", 6), ("validation", 4)):
        for shade, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(n):
                pixels = generator.integers(
                    40 * shade, 40 * shade + 100, (20, 20, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture
def study(world, vit_folder, tmp_path) -> Path:
    """A study file whose run takes a second."""
    (tmp_path / "tree.csv").write_text(TREE)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"""
        model_name: {vit_folder}
        dataset_path: {world}
        hook_names: ["blocks.*.hook_resid_post"]
        taxonomy: {tmp_path / "tree.csv"}
        architecture: topk
        k: 4
        expansion_factor: 2
        epochs: 2
        train_batch_size_tokens: 8
        store_batch_size_prompts: 4
        n_batches_in_buffer: 2
        lr: 1e-3
        checkpoint_path: {tmp_path / "checkpoints"}
        output_path: {tmp_path / "output"}
        logger:
          log_to_wandb: false
        """
    )
    return path


# -- the shell ------------------------------------------------------------------------------------


def test_help_without_a_command_and_on_request(taxolens):
    assert taxolens() == taxolens("--help") == taxolens("-h")
    code, out, err = taxolens("--help")
    assert (code, err) == (0, "")
    assert all(f"  {command}" in out for command in COMMANDS)
    assert "Exit codes" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_two_examples(taxolens, command):
    code, out, err = taxolens(command, "--help")
    assert (code, err) == (0, "")
    usage, _, examples = out.partition("examples:\n")
    assert usage.startswith(f"usage: taxolens {command}")
    assert len([line for line in examples.splitlines() if line.startswith("  taxolens ")]) == 2
    assert max(map(len, out.splitlines())) <= 104


def test_version_names_the_libraries(taxolens):
    code, out, _ = taxolens("--version")
    assert code == 0
    assert out.startswith("taxolens 0.")
    assert "sae-lens" in out and "torch" in out


HEAVY = ("torch", "sae_lens", "transformer_lens", "transformers", "datasets", "pandas")


def imported_by(*commands: list[str]) -> list[set[str]]:
    """The HEAVY modules after each of the commands, run one after the other in a new process."""
    code = f"""if True:
        import contextlib, io, json, sys
        from taxolens.plugin.cli import main
        found = []
        for command in {commands!r}:
            with contextlib.redirect_stdout(io.StringIO()):
                main(command)
            found.append([name for name in {HEAVY!r} if name in sys.modules])
        print(json.dumps(found))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout)]


def test_what_answers_at_once_imports_nothing_heavy(tmp_path):
    asked = [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        *(["completion", name] for name in ("bash", "zsh", "fish")),
        ["tran"],
        ["evaluate"],
        ["evaluate", "run", "--n_permutations", "few"],
        ["report"],
        ["list", "modles"],
        ["train", "--no_such_flag"],
        ["train", "--preset", "laptp"],
        ["train", "--preset", "laptop"],
        ["train", "--architecture", "topkk"],
        ["train", "--lr", "fast"],
        ["train", "--config", str(tmp_path / "none.yaml")],
        ["list", "presets"],
    ]
    for command, names in zip(asked, imported_by(*asked), strict=True):
        assert names == set(), command


def test_list_and_report_import_what_they_show(tmp_path):
    make_results(tmp_path)
    asked = [
        ["list", "taxonomies"],
        ["report", str(tmp_path), "--static"],
        ["list", "loaders"],
        ["list", "evaluators"],
        ["list", "models"],
    ]
    found = imported_by(*asked)
    assert found[0] == set()
    assert found[1] == {"pandas"}
    assert found[2] == {"pandas", "torch"}
    assert not found[3] & {"sae_lens", "transformer_lens"}
    assert "transformer_lens" in found[4] and "sae_lens" not in found[4]
    assert (tmp_path / "report.html").exists()


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "taxolens", "tran"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command: not known (did you mean 'train'?); given 'tran'.\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "command: not known (did you mean 'train'?"),
        (["list", "modles"], "kind: not known (did you mean 'models'?"),
        (["list", "presets", "--jsno"], "argument: not known (did you mean '--json'?"),
        (["evaluate"], "the following arguments are required: RUN"),
        (["evaluate", "run", "--n_permutations", "few"], "invalid int value: 'few'"),
        (["evaluate", "run", "--options", "{"], "is not JSON"),
        (["train", "--preset", "laptp"], "preset: not known (did you mean 'laptop'?"),
        (["train", "--foo", "1"], "argument: not known; given '--foo'; allowed: see --help."),
        (["train", "--presets", "laptop"], "argument: not known (did you mean '--preset'"),
        (["train", "--architecture", "topkk"], "architecture: not known (did you mean 'topk'"),
        (
            ["train", "--architecture", "gated", "--k", "3"],
            "given '--k'; allowed: with --architecture",
        ),
        (
            ["train", "--lr", "fast"],
            "argument --lr: of the wrong type; given 'fast'; allowed: float",
        ),
        (["train", "--lr", "1e-3"], "model_name: not given"),
        (["train", "--preset", "laptop"], "dataset_path: not given"),
        (
            ["train", "--max_images", "1e3"],
            "argument --max_images: of the wrong type; given '1e3'; allowed: int",
        ),
        (["completion", "csh"], "argument SHELL: invalid choice: 'csh'"),
        (["train", "--config", "no/such.yaml"], "no/such.yaml cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(taxolens, args, message):
    code, out, err = taxolens(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("tokens: given 'x'"), 2, "error: tokens: given 'x'\n"),
        (DataError("12 images\nare corrupt"), 1, "error: 12 images are corrupt\n"),
        (
            KeyError("gone"),
            1,
            "error: KeyError: 'gone' (run again with --debug for the traceback)\n",
        ),
        (KeyboardInterrupt(), 1, "error: interrupted\n"),
    ],
)
def test_exit_codes(taxolens, failing, error, code, message):
    failing(error)
    assert taxolens("list", "presets") == (code, "", message)


def test_debug_shows_the_traceback(taxolens, failing, monkeypatch):
    failing(KeyError("gone"))
    code, _, err = taxolens("list", "presets", "--debug")
    assert code == 1
    assert err.startswith("Traceback") and err.endswith("error: KeyError: 'gone'\n")
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    assert taxolens("list", "presets")[2].startswith("Traceback")
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "0")
    assert not taxolens("list", "presets")[2].startswith("Traceback")


def test_dashes_are_underscores():
    assert shell.underscored(["--no-evaluate", "--wandb-project=my-own", "a-b", "-k", "--n_x"]) == [
        "--no_evaluate",
        "--wandb_project=my-own",
        "a-b",
        "-k",
        "--n_x",
    ]


def test_a_home_is_expanded_where_shells_do_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/run", "--output_path=~/a=b", "--name", "~", "a~/b", "--x=a~/b"]
    expected = ["/home/me/run", "--output_path=/home/me/a=b", "--name", "~", "a~/b", "--x=a~/b"]
    assert shell.underscored(given) == expected


def test_an_interruption_is_continued_by():
    for stop, message in (
        (KeyboardInterrupt(), "interrupted"),
        (KeyboardInterrupt("SIGTERM"), "SIGTERM"),
    ):
        match = f"^{message}; again$"
        with pytest.raises(KeyboardInterrupt, match=match), shell.continued_by("again"):
            raise stop


def test_while_it_works_only_json_reaches_stdout(capsys):
    with shell.working() as print_json:
        print("chatter")
        logging.getLogger("sae_lens").info("a step")
        logging.getLogger("taxolens.plugin").info("another")
        print_json({"number": 1.5, "undefined": float("nan"), "where": Path("a"), "many": (1, 2)})
    logging.getLogger("sae_lens").info("afterwards")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "number": 1.5,
        "undefined": None,
        "where": "a",
        "many": [1, 2],
    }
    assert captured.err == "chatter\na step\nanother\n"


def test_logs_and_errors_are_not_glued_to_a_progress_bar(capsys):
    with shell.working():
        bar = tqdm.tqdm(total=3, desc="training", file=sys.stderr, mininterval=0)
        bar.update()
        logging.getLogger("taxolens.plugin").warning("a warning")
        bar.update()
        shell.print_error("it failed")
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    assert "a warning" in lines
    assert lines[-2:] == ["error: it failed", ""]
    assert bar.disable  # closed


# -- completion -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def complete(tmp_path_factory):
    """What bash offers after the words of a command line."""
    folder = tmp_path_factory.mktemp("completion")
    script = folder / "taxolens.bash"
    with script.open("w") as file, contextlib.redirect_stdout(file):
        assert cli.main(["completion", "bash"]) == 0

    def offered(*words):
        code = (
            f"source {script}; COMP_WORDS=(taxolens {' '.join(map(repr, words))});"
            f'COMP_CWORD={len(words)}; _shtab_taxolens; echo "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=folder)
        return done.stdout.split()

    return offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], list(COMMANDS)),
        (["tr"], ["train"]),
        (["train", "--preset", ""], list(PRESETS)),
        (["train", "--preset", "lap"], ["laptop"]),
        (["train", "--architecture", "topk"], ["topk"]),
        (
            ["train", "--lr_"],
            ["--lr_scheduler_name", "--lr_warm_up_steps", "--lr_end", "--lr_decay_steps"],
        ),
        (["train", "--level_w"], ["--level_weights", "--level_widths"]),
        (["train", "--config", "taxo"], ["taxolens.bash"]),
        (["evaluate", "run", "--evaluators", "pair_depth", "lch"], ["lch_height"]),
        (["evaluate", "run", "--taxonomy", "cif"], ["cifar100"]),
        (["list", ""], list(list_command.KINDS)),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes(complete, words, offered):
    assert complete(*words) == offered


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_scripts_of_other_shells_name_everything(taxolens, name):
    code, out, _ = taxolens("completion", name)
    assert code == 0
    for word in (
        *COMMANDS,
        *PRESETS,
        "evaluators",
        "archetypal_topk",
        "lch_height",
        "train_batch_size_tokens",
    ):
        assert word in out


def test_names_read_off_the_source_are_those_of_the_classes():
    assert set(quick_check.architecture_names()) == set(SAE_TRAINING_CLASS_REGISTRY)
    assert set(builtin.EVALUATORS) == set(EVALUATORS)
    assert set(builtin.TAXONOMIES) == set(TAXONOMIES)
    assert set(builtin.ARCHITECTURES) == set(ARCHITECTURES)
    read = {*quick_check.runner_fields(), *quick_check.sae_fields(), "help"}
    parsed: set[str] = set()
    for name in SAE_TRAINING_CLASS_REGISTRY:
        flags = train_flags._parser(name, only_given=True)
        flags._preprocessing(args=[], namespace=None)
        parsed |= {
            flag.removeprefix("--").rpartition(".")[2]
            for flag in flags._option_string_actions
            if flag.startswith("--")
        }
    negations = {name for name in parsed if name.startswith("no") and name[2:] in parsed}
    assert parsed - negations - read == set(), "flags that quick_check would refuse"
    assert set(quick_check.runner_fields()) - parsed == set(), "flags that there are not"


@pytest.mark.parametrize("architecture", SAE_TRAINING_CLASS_REGISTRY)
def test_the_flags_are_made_without_parsing_the_source_of_a_library(architecture, monkeypatch):
    """From Python 3.12 on `Generic` has no source, and each field of a class with that base cost 50 ms."""
    looked_at = []

    def find(of):
        looked_at.append(of)
        return inspect.getsource(of)

    monkeypatch.setattr("simple_parsing.docstring.inspect_getsource", find)
    simple_parsing.docstring._get_attribute_docstring.cache_clear()
    train_flags._parser(architecture, only_given=True)
    assert looked_at and typing.Generic not in looked_at


# -- list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("architectures", "topk"),
        ("models", "dinov2"),
        ("evaluators", "pair_depth"),
        ("taxonomies", "imagenet"),
        ("presets", "olson2025"),
    ],
)
def test_list_as_table_and_as_json(taxolens, kind, name):
    code, out, _ = taxolens("list", kind)
    assert code == 0
    assert name in out
    code, out, _ = taxolens("list", kind, "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows[name]["description"]
    assert rows[name]["plugin"] in ("taxolens", "sae_lens")
    assert all({"name", "description", "source", "plugin"} <= set(row) for row in rows.values())


def test_list_everything(taxolens):
    code, out, _ = taxolens("list", "--json")
    assert code == 0
    listed = json.loads(out)
    assert list(listed) == [
        "architectures",
        "models",
        "evaluators",
        "taxonomies",
        "presets",
        "loaders",
    ]
    assert [row["name"] for row in listed["presets"]] == list(PRESETS)
    metrics = {row["name"]: row for row in listed["evaluators"]}["pair_depth"]["metrics"]
    assert metrics["pair_depth"] is True


# -- train ----------------------------------------------------------------------------------------


def flags_in(text):
    words = text.replace(",", " ").split()
    return {
        word for word in words if word.startswith("--") and word not in ("--help_all", "--json")
    }


def test_the_short_help_names_only_flags_that_exist():
    full = train_flags.full_help(["--architecture", "topk"])
    assert {flag for flag in flags_in(train.HELP) if f"{flag} " not in full} == set()


def test_the_long_help_has_every_field_and_the_architectures_own(taxolens):
    code, out, _ = taxolens("train", "--help_all", "--architecture", "topk")
    assert code == 0
    for flag in (
        "--lr float",
        "--tokens str",
        "--k int",
        "--wandb_project",
        "--d_sae",
        "--hook_names",
    ):
        assert flag in out
    assert "Number of top features to keep active" in out
    assert "Data Generating Function" not in out  # a comment in SAELens's source
    assert "--l1_coefficient" not in out


def test_flags_are_laid_over_the_file(study):
    command = train_flags.parse(
        ["--config", str(study), "--k", "2", "--hook_names", "blocks.0.hook_resid_post"]
    )
    assert command.study.saes[""].fields["k"] == 2
    assert command.study.hook_names == ("blocks.0.hook_resid_post",)
    assert command.study.epochs == 2
    assert (command.evaluate, command.dry_run, command.json) == (True, False, False)
    command = train_flags.parse(["--config", str(study), "--no_evaluate", "--dry_run", "--json"])
    assert (command.evaluate, command.dry_run, command.json) == (False, True, True)


@pytest.mark.parametrize(
    ("line", "args", "started"),
    [
        ("num_workers: 2", [], True),
        ("num_workers: 0", ["--num_workers", "2"], True),
        ("num_workers: 2", ["--num_workers=0"], False),
        ("num_workers: 2", ["--dry_run"], False),
        ("", [], False),
    ],
)
def test_workers_import_beside_us(taxolens, monkeypatch, tmp_path, line, args, started):
    def worker_context():
        raise DataError("started")

    monkeypatch.setattr(train, "worker_context", worker_context)
    study = tmp_path / "study.yaml"
    study.write_text(f"model_name: no/such\ndataset_path: no/such\nhook_names: [a]\n{line}\n")
    _, _, err = taxolens("train", "--config", study, *args)
    assert ("error: started" in err) == started, err


def test_every_architecture_of_saelens_has_flags():
    args = ["--preset", "laptop", "--dataset_path", "photos", "--d_in", "768"]
    for name in SAE_TRAINING_CLASS_REGISTRY:
        command = train_flags.parse([*args, "--architecture", name])
        assert command.study.saes[""].architecture == name
        assert command.study.saes[""].fields["d_in"] == 768


def test_a_dry_run_plans_and_trains_nothing(taxolens, study, tmp_path):
    code, out, err = taxolens("train", "--config", study, "--dry_run", "--json")
    assert code == 0, err
    plan = json.loads(out)["plan"]
    assert list(plan["hook_points"]) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert plan["hook_points"]["blocks.0.hook_resid_post"] == {"d_in": 16, "d_sae": [32]}
    assert (plan["images"], plan["tokens_per_image"], plan["epochs"]) == (24, 1, 2.0)
    assert (plan["training_tokens"], plan["steps"]) == (48, 6)
    # Two SAEs of 2 x 16 x 32 weights and their biases, 4 bytes each.
    assert plan["bytes"]["output_path"] == 2 * 4 * (2 * 16 * 32 + 16 + 32)
    assert plan["evaluation"]["images"] == 16
    assert plan["evaluation"]["classes"] == 4
    cost = plan["cost"]
    assert (cost["ranks"], cost["bytes_read"]) == (1, 0)
    # 48 images; the trainer's matrix products in both SAEs, 12 x d_in x d_sae a token.
    assert cost["flops"]["sae"] == 48 * 2 * 12 * 16 * 32
    assert {*cost["seconds"]} == {"decode", "forward", "sae", "disk", "training"}
    assert cost["bottleneck"] in cost["seconds"]
    assert not list((tmp_path / "output").glob("*"))
    code, out, _ = taxolens("train", "--config", study, "--dry-run", "--ranks", "2")
    assert code == 0
    assert "for the training on 2 process(es)" in out and "bottleneck:" in out
    assert "48 tokens = 6 steps of 8" in out
    assert "16 images (validation), 4 classes in a tree of 7 nodes" in out
    assert "exchange:" not in out  # SAEs are dealt
    one = ("--hook_names", "blocks.0.hook_resid_post", "--dry_run", "--ranks", "2")
    code, out, _ = taxolens("train", "--config", study, *one)
    assert code == 0
    # 6 steps of the gradients of 2 x 16 x 32 weights and their biases.
    assert "exchange:      26 kB of gradients sent by each process, not part of the time" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hook_names", "blocks.9.hook_resid_post"], "blocks.9.hook_resid_post"),
        (["--ranks", "2"], "ranks: of the prediction alone; given 2; allowed: with --dry_run"),
        (["--ranks", "0", "--dry_run"], "ranks: too small; given 0; allowed: 1 or more"),
        (
            ["--hook_names", "blocks.0.hook_resid_post", "--ranks", "3", "--dry_run"],
            "train_batch_size_tokens: 3 processes cannot have equal shares of it; given 8",
        ),
        (["--tokens", "register"], "no register tokens; given 'register'"),
        (
            ["--d_in", "48"],
            "d_in: not the width of blocks.0.hook_resid_post; given 48; allowed: 16",
        ),
        (["--taxonomy", "imagenett"], "taxonomy: not known (did you mean 'imagenet'"),
        (["--evaluators", "pair_dept"], "evaluator: not known (did you mean 'pair_depth'"),
        (["--eval_split", "tset"], "tset"),
        (["--device", "cuda:7"], "a device of this machine, such as --device cpu."),
        (["--lr", "-1"], "lr: not possible; given -1.0"),
        (
            ["--from_pretrained_path", "sae"],
            "from_pretrained_path: no meaning for more than one SAE",
        ),
    ],
)
def test_what_cannot_work_is_said_before_training(taxolens, study, args, message):
    code, out, err = taxolens("train", "--config", study, *args)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_without_a_tree_there_is_nothing_to_evaluate_against(taxolens, study):
    text = study.read_text().replace("taxonomy:", "# taxonomy:")
    study.write_text(text)
    code, _, err = taxolens("train", "--config", study)
    assert code == 2
    assert "taxonomy: not given" in err and "--no_evaluate" in err
    assert taxolens("train", "--config", study, "--no_evaluate", "--dry_run")[0] == 0


def test_train_evaluate_report(taxolens, study, tmp_path):
    """The whole way: many hook points, results, report; then again from the saved SAEs."""
    code, out, err = taxolens("train", "--config", study, "--json")
    assert code == 0, err
    told = json.loads(out)
    output = tmp_path / "output"
    saved = {path.parent.name for path in output.glob("*/sae_weights.safetensors")}
    assert saved == {"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    assert told["results"] == str(output / "results.json")
    assert Path(told["report"]).read_text()[:20].lower().startswith("<!doctype html>")
    assert told["errors"] == {}
    assert {row["evaluator"] for row in told["summary"]} >= {"pair_depth", "ontological_coverage"}

    code, out, err = taxolens(
        "evaluate",
        output,
        "--evaluators",
        "pair_depth",
        "--output_path",
        tmp_path / "again",
        "--n_permutations",
        3,
        "--json",
    )
    assert code == 0, err
    told = json.loads(out)
    assert {row["evaluator"] for row in told["summary"]} == {"pair_depth"}
    assert {f.name for f in Path(told["metrics"]).glob("pair_depth.pair_depth.*")} == {
        "pair_depth.pair_depth.csv",
        "pair_depth.pair_depth.svg",
    }

    assert told["complete"] is True

    code, out, err = taxolens("report", tmp_path / "again", "--static")
    assert code == 0, err
    assert "pair depth" in out and "permuted" in out and "Unfinished" not in out
    assert f"a table and a figure for every metric: {tmp_path / 'again' / 'metrics'}" in out
    assert (tmp_path / "again" / "report.html").exists()


def test_one_hook_point_is_the_single_runner(taxolens, study, tmp_path):
    code, _, err = taxolens(
        "train", "--config", study, "--hook_names", "blocks.1.hook_resid_post", "--no_evaluate"
    )
    assert code == 0, err
    assert (tmp_path / "output" / "sae_weights.safetensors").exists()
    assert not (tmp_path / "output" / "results.json").exists()


def test_resume_auto_goes_on_from_a_checkpoint(taxolens, study, tmp_path):
    args = ["train", "--config", study, "--no_evaluate", "--n_checkpoints", "1"]
    assert taxolens(*args)[0] == 0
    code, _, err = taxolens(*args, "--resume_from_checkpoint", "auto")
    assert code == 0
    assert "resumes from:" in err
    code, _, err = taxolens(*args, "--checkpoint_id", "again")
    assert code == 0, err
    code, _, err = taxolens(*args, "--checkpoint_id", "again")
    assert code == 2 and "--resume_from_checkpoint auto, which goes on from them" in err


def test_a_results_file_that_is_not_there(taxolens, tmp_path):
    code, _, err = taxolens("report", tmp_path)
    assert code == 1
    assert "results.json: not found" in err


# -- demo -----------------------------------------------------------------------------------------


def test_the_demo_hands_its_folder_on(taxolens, monkeypatch, tmp_path):
    asked = []

    def run_demo(output_path):
        asked.append(output_path)
        raise DataError("stop here")

    monkeypatch.setattr("taxolens.plugin.study.demo.run_demo", run_demo)
    code, _, err = taxolens("demo", "--output-path", tmp_path / "demo")
    assert (code, err) == (1, "error: stop here\n")
    assert asked == [str(tmp_path / "demo")]
    assert demo.HELP and evaluate.HELP and report.HELP


def test_the_demo_in_miniature(tmp_path):
    small = {"max_images": 154, "eval_max_images": 308, "epochs": 4.0}
    small |= {"lr_warm_up_steps": 0, "lr_decay_steps": 0}
    made = run_demo(tmp_path, progress=False, hook_names=["blocks.{0,7}.hook_resid_post"], **small)
    assert [sae.hook_name for sae in made.results.saes] == [
        "blocks.0.hook_resid_post",
        "blocks.7.hook_resid_post",
    ]
    rows = summary_rows(made.results)
    assert list(dict.fromkeys(row["title"] for row in rows)) == [
        *("node coverage", "pair depth", "lower LCH"),
        *("level accuracy", "right group"),
    ]
    assert made.results.dataset.split == "validation"
    assert made.results.errors == {}
    assert made.report == tmp_path / "report.html"
    folders = list(made.wandb_folder.glob("offline-run-*"))
    assert len(folders) == 2 and all(any(f.glob("*.wandb")) for f in folders)  # and the evaluation
    assert "WANDB_DIR" not in os.environ
