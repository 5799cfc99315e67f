"""Old names of modules that moved: each still imports, and says where the module is now."""

import importlib
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import taxolens
from taxolens.plugin import moved

ROOT = Path(taxolens.__file__).parent
NEEDS_A_GPU = {"registry.architectures.pursuit_triton"}


@pytest.mark.parametrize("old", [name for name in moved.MOVED if name not in NEEDS_A_GPU])
def test_the_old_module_has_what_the_new_ones_have(old):
    name, places = f"taxolens.{old}", moved.new_places(f"taxolens.{old}")
    sys.modules.pop(name, None)
    with pytest.warns(
        FutureWarning, match=f"{name} has moved; import it from {places[0]}"
    ) as caught:
        module = importlib.import_module(name)
    assert len([w for w in caught if name in str(w.message)]) == 1
    for place in places:
        new = importlib.import_module(place)
        public = [attribute for attribute in vars(new) if not attribute.startswith("_")]
        assert public and set(public) <= set(module.__all__)
        if len(places) == 1:
            for attribute in public:
                assert getattr(module, attribute) is getattr(new, attribute)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'no_such'"):
        _ = module.no_such


@pytest.mark.parametrize("old", moved.MOVED)
def test_no_old_name_stands_for_something_else(old):
    path = ROOT.joinpath(*old.split("."))
    assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()
    for place in moved.new_places(f"taxolens.{old}"):
        assert place.partition(".")[2] not in moved.MOVED, "moved twice: name the last place"
        path = ROOT.joinpath(*place.split(".")[1:])
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_the_warning_points_at_the_importing_line():
    sys.modules.pop("taxolens.registry.evaluators.accumulators", None)
    with pytest.warns(FutureWarning) as caught:
        from taxolens.registry.evaluators.accumulators import FiringRate
    assert [w.filename for w in caught] == [__file__]
    from taxolens.registry.evaluators.parts import accumulators

    assert FiringRate is accumulators.FiringRate


def test_modules_inside_a_package_that_moved():
    sys.modules.pop("taxolens.hooks.families.dinov2", None)
    with pytest.warns(FutureWarning, match=r"from taxolens\.hooks\.models\.families\.dinov2\."):
        from taxolens.hooks.families.dinov2 import Dinov2Adapter
    from taxolens.hooks.models.families import dinov2

    assert Dinov2Adapter is dinov2.Dinov2Adapter


def test_old_pickles_load():
    old = b"ctaxolens.hooks.images\nRawImage\n(I3\nNNI1\ntR."
    assert pickle.loads(old).index == 3
    old = b"ctaxolens.hooks.preprocess\nPilPreprocess\n."
    assert pickle.loads(old).__module__ == "taxolens.hooks.images.preprocess"


def test_what_never_was_is_not_found():
    for name in ("taxolens.hooks.no_such", "taxolens.no_such", "no_such_package"):
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)
