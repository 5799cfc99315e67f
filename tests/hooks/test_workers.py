"""Workers that decode images import little, share one server, and leave the user's script alone."""

import functools
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import worker_view
from taxolens.hooks.images import ImageLoader, load_images, loader, workers
from taxolens.hooks.images.preprocess import PilPreprocess
from taxolens.plugin import demo_assets
from taxolens.registry.errors import TaxolensError
from tiny_images import hf_dataset

needs_fork_server = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a fork server"
)


@needs_fork_server
def test_workers_of_two_pools_import_little_and_share_a_server():
    images = load_images(hf_dataset(8))
    servers = set()
    for pool in range(2):
        loader = ImageLoader(
            images, worker_view.of_this_process, batch_size=4, num_workers=1 + pool
        )
        for batch in loader.batches(range(8)):
            server, *imported = batch.pixel_values[0, 0, 0].tolist()
            servers.add(server)
            found = dict(zip(worker_view.LOOKED_FOR, imported, strict=True))
            assert found["torch"] and found["datasets"]
            assert not found["sae_lens"] and not found["transformer_lens"], found
            assert not found["transformers"]
    assert len(servers) == 1 and servers != {os.getpid()}


def test_what_the_server_imports_exists(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for module in workers.PRELOADED:
        importlib.import_module(module)


def defined_in_main(name="f"):
    function = types.FunctionType((lambda: 0).__code__, {}, name)
    function.__module__ = "__main__"
    return function


def test_what_refers_to_main(monkeypatch):
    function = defined_in_main()
    monkeypatch.setattr(sys.modules["__main__"], "f", function, raising=False)
    for task in (function, functools.partial(function, 1), {"deep": [(1, function)]}):
        assert workers.refers_to_main(task)
    images = load_images(hf_dataset(4))
    for task in (images.reader, worker_view.of_this_process, torch.ones(2), None):
        assert not workers.refers_to_main(task)
    assert workers.refers_to_main(lambda image: image), "cannot be pickled: nothing is known"


def test_main_is_as_it_was_afterwards(monkeypatch):
    main = sys.modules["__main__"]
    before = main.__spec__
    with pytest.raises(KeyError), workers.main_left_out(None) as left_out:
        assert left_out and main.__spec__.name == "__main__"
        raise KeyError
    assert main.__spec__ is before
    monkeypatch.setattr(main, "f", defined_in_main(), raising=False)
    with workers.main_left_out(main.f) as left_out:
        assert not left_out and main.__spec__ is before


SCRIPT = """
import sys
print("script")
from taxolens.hooks.images import workers
workers.PRELOADED.clear()  # this is about the script, and quicker so
{define}
def work():
    task = {task}
    with workers.main_left_out(task):
        process = workers.worker_context().Process(target=task, args=("worker",))
        process.start()
    process.join()
    assert "torch" not in sys.modules
{start}
"""
GUARD = 'if __name__ == "__main__":\n    work()'
OWN = "def task_of_ours(text):\n    print(text, flush=True)"


def run(script: str, folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    (folder / "package").mkdir()
    for name in ("script.py", "package/__init__.py", "package/__main__.py", "package/module.py"):
        (folder / name).write_text("" if "init" in name else script)
    command = {
        "file": ["script.py"],
        "stdin": ["-"],
        "package": ["-m", "package"],
        "module": ["-m", "package.module"],
    }[how]
    given = script if how == "stdin" else None
    return subprocess.run(
        [sys.executable, *command],
        input=given,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("how", ["file", "stdin", "package", "module"])
def test_no_script_is_run_again_and_none_needs_a_guard(tmp_path, how):
    done = run(SCRIPT.format(define="", task="print", start="work()"), tmp_path, how)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["script", "worker"], done.stderr


@pytest.mark.parametrize("how", ["file", "module"])
def test_a_guarded_script_may_send_what_it_defines(tmp_path, how):
    done = run(SCRIPT.format(define=OWN, task="task_of_ours", start=GUARD), tmp_path, how)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["script", "script", "worker"], done.stderr


LOADING = """
from taxolens.hooks.images import ImageLoader, load_images
from taxolens.hooks.images.preprocess import PilPreprocess
print("script")
def flat(image):
    import numpy
    return numpy.zeros((3, 1, 1), dtype=numpy.float32)
images = load_images({dataset!r}, split="validation", max_images=16)
plain = PilPreprocess(size=None, crop=(3, 3))
for batch in ImageLoader(images, {preprocess}, batch_size=8, num_workers=2).batches(range(16)):
    print(len(batch))
"""


def test_a_script_without_a_guard_reads_images(tmp_path):
    script = LOADING.format(dataset=str(demo_assets.dataset_path()), preprocess="plain")
    done = run(script, tmp_path, "file")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["script", "8", "8"]


@pytest.mark.parametrize("how", ["file", "stdin", "package"])
def test_a_script_that_sends_its_own_without_a_guard_decodes_by_itself(tmp_path, how):
    script = LOADING.format(dataset=str(demo_assets.dataset_path()), preprocess="flat")
    done = run(script, tmp_path, how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["script", "8", "8"]
    assert "each worker would run the whole script again" in done.stderr


def test_the_start_of_workers_can_be_given_up():
    waiting = threading.Event()
    try:
        assert workers.made_apart(lambda: waiting.wait(60), lambda: True) is None
    finally:
        waiting.set()
    assert workers.made_apart(lambda: 7, lambda: False) == 7
    with pytest.raises(KeyError):
        workers.made_apart(lambda: {}["x"], lambda: False)


def test_a_worker_that_was_given_up_prints_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    from taxolens.hooks.images.worker_server import _unless_given_up

    def __setstate__(error):
        raise error

    def other(error):
        raise error

    for call, error, is_shown in (
        (__setstate__, FileNotFoundError("gone"), False),
        (__setstate__, ValueError("wrong"), True),
        (other, FileNotFoundError("gone"), True),
    ):
        try:
            call(error)
        except Exception:
            _unless_given_up(*sys.exc_info())
        assert ("Traceback" in capsys.readouterr().err) == is_shown


def test_reading_ends_once_it_is_stopped():
    images = load_images(demo_assets.dataset_path(), split="validation", max_images=40)
    preprocess = PilPreprocess(size=None, crop=(3, 3))
    for num_workers in (0, 1):
        reading = loader.ImageLoader(images, preprocess, batch_size=1, num_workers=num_workers)
        stopped = threading.Event()
        batches = reading.grouped([[i] for i in range(40)], stopped.is_set)
        assert len(next(batches)) == len(next(batches)) == 1
        stopped.set()
        assert list(batches) == []
        assert list(reading.grouped([[0]], lambda: True)) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="stopped processes are seen there")
def test_a_stopped_worker_ends_the_work(monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE", 2)
    images = load_images(demo_assets.dataset_path(), split="validation", max_images=40)
    reading = loader.ImageLoader(
        images,
        PilPreprocess(size=None, crop=(3, 3)),
        batch_size=1,
        num_workers=1,
        prefetch_factor=1,
    )
    ending = set(multiprocessing.active_children())  # those of a test before this one
    batches = reading.batches(range(40))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - ending
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(
        TaxolensError, match=r"num_workers: processes that decode images were stopped"
    ):
        list(batches)
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize(
    ("given", "n_images", "cores", "expected"),
    [
        (None, 5000, 16, 15),
        (None, 5000, 2, 1),
        (None, 5000, 1, 0),  # a single core
        (None, 1023, 16, 0),  # few images
        (None, None, 4, 3),  # a stream
        (None, 5000, 200, 32),
        (0, 5000, 16, 0),
        (3, 10, 1, 3),  # what is asked for is done
    ],
)
def test_workers_by_default(monkeypatch, given, n_images, cores, expected):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    assert workers.workers_for(given, n_images) == expected
