"""Files are read without running them: what they may build, and what they may try."""

import contextlib
import gzip
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from taxolens.registry.errors import CheckpointError
from taxolens.registry.loaders.parts import safe_pickle
from taxolens.registry.loaders.parts.safe_pickle import Global, Record, load

# -- forms ------------------------------------------------------------------------------------------


def bare(value, protocol=2):
    return pickle.dumps(value, protocol)


def torch_zip(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def torch_legacy(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def zip_of(program, **records):
    """A zip file as torch.save writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in records.items():
            archive.writestr(f"archive/data/{name.lstrip('_')}", content)
    return buffer.getvalue()


def legacy_of(program, keys=(), numbers=b""):
    """A file of torch.save's older format, around any pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (safe_pickle.LEGACY_MAGIC, safe_pickle.LEGACY_PROTOCOL, system)
    return b"".join(map(bare, parts)) + program + bare(list(keys)) + numbers


def nested(content):
    """A pickle that hands `content` to torch.load, as the pickle of a tensor does."""
    return b"\x80\x02ctorch.storage\n_load_from_bytes\nB" + (
        len(content).to_bytes(4, "little") + content + b"\x85R."
    )


FORMS = {
    "bare": lambda program: program,
    "gzip": gzip.compress,
    "gzip twice": lambda program: gzip.compress(gzip.compress(program)),
    "zip": zip_of,
    "legacy": legacy_of,
    "nested bare": nested,
    "nested zip": lambda program: nested(zip_of(program)),
    "nested legacy": lambda program: nested(legacy_of(program)),
    "gzip of nested": lambda program: gzip.compress(nested(legacy_of(program))),
    "nested in zip": lambda program: zip_of(nested(program)),
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="file.pt"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


# -- what is read -----------------------------------------------------------------------------------


def tensors():
    base = torch.arange(24.0).reshape(4, 6)
    return OrderedDict(
        plain=base,
        turned=base.T,
        part=base[1:, 2:4],
        half=base.half(),
        brain=base.bfloat16(),
        whole=torch.arange(5),
        yes=torch.tensor([True, False]),
        scalar=torch.tensor(1.5),
        empty=torch.empty(0, 3),
        weight=torch.nn.Parameter(torch.ones(2)),
    )


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("own", [False, True], ids=["weights_only", "own machine"])
@pytest.mark.parametrize(
    "form", [torch_zip, torch_legacy, bare, lambda v: gzip.compress(bare(v, 4))]
)
def test_tensors_of_every_form_are_those_that_were_saved(write, monkeypatch, form, own):
    if own:
        monkeypatch.setattr(safe_pickle, "_weights_only", lambda file: None)
    assert_equal(load(write(form(tensors()))), tensors())


@pytest.mark.parametrize("form", [torch_zip, torch_legacy])
def test_weights_only_comes_first_where_nothing_else_is_named(write, monkeypatch, form):
    asked = []
    monkeypatch.setattr(safe_pickle, "_weights_only", lambda file: asked.append(1))
    load(write(form(tensors())))
    assert asked == [1]
    load(write(form({"cfg": np.float64(1.0), "x": torch.ones(2)})))
    assert asked == [1], "weights_only would refuse this file: it is not asked"


def test_shared_storage_and_an_offset_in_the_file(write):
    base = torch.arange(6.0).reshape(2, 3)
    path = write(b'{"header": 1}\n' + torch_zip({"a": base, "b": base.T}))
    found = load(path, offset=14)
    assert torch.equal(found["b"], base.T)
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_a_file_from_a_gpu_is_read_without_one(write, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    contents = [torch_zip({"x": torch.ones(3)}), torch_legacy({"x": torch.ones(3)})]
    monkeypatch.undo()
    for content in contents:
        assert b"cuda:3" in content
        assert load(write(content))["x"].device.type == "cpu"


def test_the_oldest_storages_of_a_gpu_are_read(write):
    program = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storagectorch.cuda\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x06\x00\x00\x00cuda:0K\x02NtQK\x00K\x02\x85K\x01\x85tR."
    )
    numbers = (2).to_bytes(8, "little") + np.float32([1, 2]).tobytes()
    assert load(write(legacy_of(program, ["0"], numbers))).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_of_numpy(write, protocol):
    value = {
        "scalar": np.float64(0.25),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
    }
    found = load(write(bare(value, protocol)))
    assert found["scalar"] == 0.25
    for name in ("array", "fortran", "big"):
        array = found[name].fields["array"] if isinstance(found[name], Record) else found[name]
        assert np.array_equal(array, value[name]), name


@pytest.mark.parametrize("protocol", range(6))
def test_plain_python_is_rebuilt(write, protocol):
    value = {
        "text": "größe\n",
        "bytes": b"\x00\xff",
        "numbers": [0, -1, 2**70, 1.5, True, None],
        "tuples": ((), (1,), (1, 2), (1, 2, 3, 4)),
        "sets": [{1, 2}, frozenset({3})],
        3: {"deep": [[[]]]},
        (1, "a"): OrderedDict(b=1),
    }
    found = load(write(bare(value, protocol)))
    assert found["numbers"] == value["numbers"]
    assert (found["text"], found["bytes"], found["tuples"]) == (
        value["text"],
        value["bytes"],
        value["tuples"],
    )
    assert [set(items) for items in found["sets"]] == [{1, 2}, {3}]
    assert found[3] == {"deep": [[[]]]}
    assert found[1, "a"] == {"b": 1}


@dataclass
class Config:
    k: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cuda:1"))
    dtype: torch.dtype = torch.float16


@pytest.fixture
def foreign(monkeypatch):
    """A class that exists only while it is pickled."""
    module = types.ModuleType("no_such_library_1f2e")
    config = type("Config", (Config,), {"__module__": module.__name__})
    module.Config = config
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield config
    assert module.__name__ not in sys.modules or sys.modules[module.__name__] is module


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_unknown_classes_are_records_with_fields(write, foreign, monkeypatch, protocol):
    content = bare({"cfg": foreign(k=5), "kind": foreign}, protocol)
    monkeypatch.delitem(sys.modules, "no_such_library_1f2e")
    found = load(write(content))
    assert isinstance(found["cfg"], Record)
    assert found["cfg"].kind == "no_such_library_1f2e.Config"
    assert found["cfg"].fields["k"] == 5
    assert found["cfg"].fields["dtype"] is torch.float16
    assert found["cfg"].fields["device"].kind == "torch.device"
    assert found["kind"] == Global("no_such_library_1f2e.Config")
    assert "no_such_library_1f2e" not in sys.modules


def test_a_pickled_module_has_its_parameters(write):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    found = load(write(torch_zip(module)))
    assert found.kind == "torch.nn.modules.container.Sequential"
    linear = found.fields["_modules"]["0"]
    assert torch.equal(linear.fields["_parameters"]["weight"], module[0].weight)


# -- what they try ----------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """(path of a file that must not come to be, name of a module that makes it when imported)."""
    marker = tmp_path / "ran"
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "trap_module_7a1c.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        f"class Trap:\n"
        f"    def __new__(cls, *a, **k): open({str(marker)!r}, 'w').close(); return object.__new__(cls)\n"
        f"    def __setstate__(self, s): open({str(marker)!r}, 'w').close()\n"
        f"def trap(*a, **k): open({str(marker)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield marker
    assert not marker.exists(), "something ran"
    assert "trap_module_7a1c" not in sys.modules, "something was imported"


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def programs(marker):
    """Pickles that make `marker` when they are run."""
    touch = f"open({str(marker)!r}, 'w').close()"
    run = b"\x80\x02cbuiltins\nexec\n" + text(touch) + b"\x85R"
    return {
        "reduce exec": run + b".",
        "reduce eval, protocol 0": f"cbuiltins\neval\n(V{touch}\ntR.".encode(),
        "reduce os.system": b"cposix\nsystem\n" + text(f"touch {marker}") + b"\x85R.",
        "reduce open": b"cbuiltins\nopen\n" + text(str(marker)) + text("w") + b"\x86R.",
        "stack global": b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + text(touch) + b"\x85R.",
        "dotted name": b"\x80\x04" + text("trap_module_7a1c") + text("Trap.mro") + b"\x93)R.",
        "inst": f"(V{touch}\nibuiltins\nexec\n.".encode(),
        "obj": b"(cbuiltins\nexec\n" + text(touch) + b"o.",
        "newobj": b"\x80\x02ctrap_module_7a1c\nTrap\n)\x81.",
        "newobj_ex": b"\x80\x04" + text("trap_module_7a1c") + text("Trap") + b"\x93)}\x92.",
        "build": b"\x80\x02ctrap_module_7a1c\nTrap\n)\x81}" + text("a") + b"K\x01sb.",
        "build of state": b"\x80\x02ctrap_module_7a1c\nTrap\n)\x81K\x01b.",
        "import alone": b"\x80\x02ctrap_module_7a1c\ntrap\n.",
        "getattr": b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("trap_module_7a1c")
        + b"\x85R" + text("trap") + b"\x86R)R.",
        "apply": b"cfunctools\npartial\ncbuiltins\nexec\n" + text(touch) + b"\x86R)R.",
        "map in a list": b"cbuiltins\nlist\ncbuiltins\nmap\ncbuiltins\nexec\n](" + text(touch)
        + b"e\x86R\x85R.",
        "in a dict of weights": b"}(" + text("W_enc") + run + text("k") + b"K\x01u.",
        "as a key": b"}" + run + b"K\x01s.",
        "in a set": b"cbuiltins\nset\n](" + run + b"e\x85R.",
        "after a pop": run + b"0K\x01.",
        "in a memo": run + b"q\x000h\x00.",
        "type of a tensor": b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nexec\nctorch\nTensor\n"
        + text(touch) + b"\x85NtR.",
        "hooks of a parameter": b"ctorch._utils\n_rebuild_parameter\n(K\x01I01\n" + run + b"tR.",
        "array of objects": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01"
        b"K\x01\x85cnumpy\ndtype\n(" + text("O8") + b"I00\nI01\ntR(K\x03" + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89](" + run + b"etb.",
        "codec": b"c_codecs\nencode\n" + text(touch) + text("trap_module_7a1c") + b"\x86R.",
        "persistent id": b"\x80\x02" + run + b"Q.",
        "persistent text": b"Ptrap_module_7a1c\n.",
        "persistent module": text("module") + b"ctrap_module_7a1c\nTrap\n" + text("a") + text("b")
        + b"(1NNNNtQ.",
        "storage type": b"(" + text("storage") + b"ctrap_module_7a1c\nFloatStorage\n" + text("0")
        + text("cpu") + b"K\x01tQ.",
        "extension": b"\x80\x02\x82\x01.",
        "buffer": b"\x80\x05\x97.",
    }  # fmt: skip


NAMES = sorted(programs("x"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_runs(write, trap, name, form):
    path = write(FORMS[form](programs(trap)[name]))
    try:
        load(path)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_the_programs_would_run(tmp_path):
    """Python's own reader falls for enough of them that their absence above means something."""
    ran = []
    for name, program in programs(tmp_path / "ran").items():
        with contextlib.suppress(Exception):  # some need the trap's module, or fail after they ran
            pickle.loads(program)
        if (tmp_path / "ran").exists():
            ran.append(name)
            (tmp_path / "ran").unlink()
    assert len(ran) >= 14, ran


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("form", [bare, torch_zip, torch_legacy])
@pytest.mark.parametrize("protect", [lambda content: content, gzip.compress])
def test_objects_that_torch_itself_saved_do_not_run(write, trap, form, protect):
    found = load(write(protect(form({"state_dict": {"W": torch.ones(2)}, "cfg": Evil(trap)}))))
    assert torch.equal(found["state_dict"]["W"], torch.ones(2))
    assert found["cfg"].kind.endswith(".mkdir")
    assert found["cfg"].args == (str(trap),)


# -- how large they claim to be -----------------------------------------------------------------------


def storage(numel, key="0", kind=b"FloatStorage"):
    number = b"\x8a\x08" + numel.to_bytes(8, "little")
    return (
        b"("
        + text("storage")
        + b"ctorch\n"
        + kind
        + b"\n"
        + text(key)
        + text("cpu")
        + number
        + b"tQ"
    )


def tensor(numel=2, size=(2,), stride=(1,), offset=0):
    def numbers(values):
        return (
            b"("
            + b"".join(b"\x8a\x08" + v.to_bytes(8, "little", signed=True) for v in values)
            + b"t"
        )

    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel) + numbers([offset]) + b"0"
        b"\x8a\x08" + offset.to_bytes(8, "little", signed=True) + numbers(size) + numbers(stride)
        + b"\x89}tR."
    )  # fmt: skip


TWO = np.float32([1, 2]).tobytes()


def test_the_handmade_tensor_is_one(write):
    assert load(write(zip_of(tensor(), _0=TWO))).tolist() == [1.0, 2.0]
    numbers = (2).to_bytes(8, "little") + TWO
    assert load(write(legacy_of(tensor(), ["0"], numbers))).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "program",
    [
        tensor(numel=2**40),
        tensor(numel=3),
        tensor(size=(3,)),
        tensor(size=(2**40,)),
        tensor(size=(2**40,), stride=(0,)),
        tensor(size=(2**31, 2**31), stride=(0, 0)),
        tensor(offset=1),
        tensor(stride=(2,)),
        tensor(stride=(-1,)),
        tensor(size=(-2,)),
        tensor(size=(2, 1)),
    ],
    ids=range(11),
)
def test_a_tensor_is_no_larger_than_the_file(write, program):
    for content in (
        zip_of(program, _0=TWO),
        legacy_of(program, ["0"], (2).to_bytes(8, "little") + TWO),
        legacy_of(program, ["0"], (2**40).to_bytes(8, "little") + TWO),
    ):
        with pytest.raises(
            CheckpointError, match=r"it cannot be read: (a tensor|it holds|numbers)"
        ):
            load(write(content))


def test_a_tensor_without_numbers_is_refused(write):
    with pytest.raises(CheckpointError, match="claims 2 numbers that are not in it"):
        load(write(zip_of(tensor())))
    with pytest.raises(CheckpointError, match="missing"):
        load(write(legacy_of(tensor())))
    with pytest.raises(CheckpointError, match="no tensor"):
        load(write(legacy_of(tensor(), ["other"], (2).to_bytes(8, "little") + TWO)))


def doubling(times, last):
    """A list that holds the one before twice, and so on: small, and endless when walked."""
    program = b"\x80\x02]q\x00"
    for index in range(times):
        program += b"](h" + bytes([index]) + b"h" + bytes([index]) + b"eq" + bytes([index + 1])
    return program + last


def test_memo_bombs_stay_small(write):
    assert isinstance(load(write(doubling(200, b"."))), list)
    with pytest.raises(CheckpointError, match="a key that is a"):
        load(write(b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 99 + b"q\x01}h\x01K\x01s."))
    with pytest.raises(CheckpointError, match="more copies than it has content"):
        again = b"0cbuiltins\nlist\nh\x00\x85R" * 400
        load(write(b"\x80\x02](" + b"K\x01" * 30_000 + b"eq\x00" + again + b"."))
    with pytest.raises(CheckpointError, match="more copies than it has content"):
        again = b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R0"
        load(write(b"\x80\x02" + text("a" * 50_000) + b"q\x00" + again * 200 + b"."))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.", "truncated or damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "truncated or damaged"),
        (b"\x80\x02]r\xff\xff\xff\xff.", None),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "truncated or damaged"),
        (b"\x80\x02" + b"(" * 100_000 + b".", None),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", None),
        (b"\x80\x02\x85.", "truncated or damaged"),
        (b"\x80\x02h\x07.", "truncated or damaged"),
        (b"\x80\x02K\x01", "truncated"),
        (b"\x80\x02K\x01K\x02t.", "a mark is missing"),
        (b"no pickle at all", "truncated or damaged"),
        (b"", "it is empty"),
        (b"\x80\x02K\x01K\x02K\x03s.", "damaged"),
        (b"\x1f\x8b" + b"x" * 20, "gzip data is truncated or damaged"),
        (gzip.compress(b"a" * 200, mtime=0)[:-9], "gzip data is truncated or damaged"),
        (b"PK\x03\x04" + b"x" * 100, "zip archive is truncated or damaged"),
    ],
)
def test_broken_programs(write, program, message):
    path = write(program)
    if message is None:
        load(path)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "allowed: a whole file of torch.save or pickle." in str(caught.value)


def test_a_gzip_bomb_is_refused(write):
    with pytest.raises(CheckpointError, match="expands by more than 64 times"):
        load(write(gzip.compress(b"\x00" * 50_000_000)))


def test_too_many_instructions_are_refused(write, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 instructions"):
        load(write(b"\x80\x02" + b"N0" * 1000 + b"N."))


def test_zip_files_of_other_kinds(write):
    def archive(compression=zipfile.ZIP_STORED, **names):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, content in names.items():
                file.writestr(name.replace("__", "/").replace("_dot_", "."), content)
        return buffer.getvalue()

    script = archive(a__data_dot_pkl=b"N.", a__constants_dot_pkl=b"N.")
    two = archive(a__data_dot_pkl=b"N.", b__data_dot_pkl=b"N.")
    for content in (archive(a=b"N."), script, two):
        with pytest.raises(CheckpointError, match=r"none of torch\.save"):
            load(write(content))
    with pytest.raises(CheckpointError, match="compressed"):
        load(write(archive(zipfile.ZIP_DEFLATED, a__data_dot_pkl=b"N" * 999 + b".")))
    with pytest.raises(CheckpointError, match="byte order"):
        load(write(archive(a__data_dot_pkl=b"N.", a__byteorder=b"big")))


@pytest.mark.parametrize("form", [torch_zip, torch_legacy, bare])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(write, form, share):
    content = form({"W": torch.ones(100, 10)})
    with pytest.raises(CheckpointError, match=r"truncated|missing|claims"):
        load(write(content[: int(len(content) * share)]))


def test_a_flipped_bit_in_a_zip_is_noticed(write):
    content = bytearray(torch_zip({"W": torch.zeros(1000)}))
    content[content.index(b"\x00" * 2000) + 1000] ^= 1
    with pytest.raises(CheckpointError, match=r"truncated or damaged|is damaged"):
        load(write(bytes(content)))


def test_a_record_tells_little_of_itself():
    huge = Record("a" * 500, ([],), {"x": [0] * 1000})
    assert len(repr(huge)) < 120


def test_no_such_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")
