import pytest
from hypothesis import given
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError, DuplicateNameError, UnknownNameError
from taxolens.registry.table import Table


def test_register_and_read() -> None:
    table: Table[int] = Table("evaluator")
    table.register("pair_depth", 1, plugin="mine")
    assert table["pair_depth"] == 1
    assert list(table) == ["pair_depth"] and len(table) == 1
    assert table.plugin_of("pair_depth") == "mine"


def test_duplicate_names_both_plugins() -> None:
    table: Table[int] = Table("evaluator")
    table.register("pair_depth", 1, plugin="first")
    with pytest.raises(DuplicateNameError, match=r"'first'.*'second'; given 'pair_depth'"):
        table.register("pair_depth", 2, plugin="second")
    assert table["pair_depth"] == 1


def test_unknown_name_lists_the_nearest() -> None:
    table: Table[int] = Table("evaluator")
    for name in ("pair_depth", "lch_height", "stability"):
        table.register(name, 0)
    with pytest.raises(
        UnknownNameError, match=r"evaluator: not known .did you mean 'pair_depth'\?"
    ):
        table["pair_dept"]
    with pytest.raises(ConfigError, match="allowed: lch_height, pair_depth, stability"):
        table["zzz"]


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(), max_size=6), st.text())
def test_behaves_as_a_mapping(entries: dict[str, int], probe: str) -> None:
    table: Table[int] = Table("thing")
    for name, value in entries.items():
        table.register(name, value)
    assert dict(table) == entries
    assert (probe in table) == (probe in entries)
    assert table.get(probe) == entries.get(probe)


def test_the_message_is_printed_plainly() -> None:
    with pytest.raises(UnknownNameError) as error:
        Table("taxonomy")["imagenet"]
    assert str(error.value) == "taxonomy: not known; given 'imagenet'; allowed: none."
