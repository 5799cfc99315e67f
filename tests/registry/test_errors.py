"""The grammar of error messages: `field: problem; given X; allowed: Y.`"""

import pickle

import pytest
from taxolens.registry.errors import ConfigError, CorruptImageError, DataError, UnknownNameError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("k", "must be above 0", given=0, allowed="1 or more"),
         "k: must be above 0; given 0; allowed: 1 or more."),
        (ConfigError("split", "is missing", given=None), "split: is missing; given None."),
        (DataError("a.npy", "is not complete.", allowed="build it again."),
         "a.npy: is not complete; allowed: build it again."),
        (ConfigError("k", "is long", given="a" * 999), f"k: is long; given '{'a' * 146} ... {'a' * 146}'."),
        (UnknownNameError("a complete message"), "a complete message"),
    ],
)  # fmt: skip
def test_the_parts_of_a_message(error: Exception, message: str) -> None:
    assert str(error) == message
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), message)


def test_an_image_error_keeps_its_parts_across_processes() -> None:
    copy = pickle.loads(pickle.dumps(CorruptImageError(3, "a.jpg", "the file is empty")))
    assert (copy.index, copy.source, copy.reason) == (3, "a.jpg", "the file is empty")
    assert str(copy) == "image 3 (a.jpg) cannot be read: the file is empty"
