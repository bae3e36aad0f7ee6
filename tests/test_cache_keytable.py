import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcli.cache.keytable import KeyTable


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


UNIQUE = st.lists(st.text(min_size=1, max_size=12).filter(encodable), unique=True)


@given(UNIQUE)
def test_a_table_gives_back_what_was_packed(keys: list[str]) -> None:
    table = KeyTable.from_strings(keys)
    assert list(table) == keys
    assert len(table) == len(keys)
    assert list(pickle.loads(pickle.dumps(table))) == keys


@given(UNIQUE, UNIQUE)
def test_find_is_a_dictionary_lookup(here: list[str], asked: list[str]) -> None:
    rows = {key: row for row, key in enumerate(here)}
    found = KeyTable.from_strings(here).find(KeyTable.from_strings(asked))
    assert found.tolist() == [rows.get(key, -1) for key in asked]


@given(UNIQUE, st.data())
def test_select_takes_rows_in_the_order_asked_for(keys: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, max(0, len(keys) - 1)), max_size=20)) if keys else []
    chosen = KeyTable.from_strings(keys).select(np.asarray(rows, np.int64))
    assert list(chosen) == [keys[row] for row in rows]


def test_equal_hashes_do_not_make_equal_keys(monkeypatch) -> None:
    # All keys collide: only their bytes tell them apart.
    monkeypatch.setattr(KeyTable, "hashes", lambda self: np.zeros(len(self), np.int64))
    table = KeyTable.from_strings(["a", "b", "c"])
    assert table.find(KeyTable.from_strings(["c", "x", "a"])).tolist() == [2, -1, 0]


def test_the_digest_knows_order_and_boundaries() -> None:
    digests = {
        KeyTable.from_strings(keys).digest() for keys in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])
    }
    assert len(digests) == 4


def test_concatenation_joins_tables() -> None:
    joined = KeyTable.concatenate([KeyTable.from_strings(["a", "bb"]), KeyTable.from_strings(["ccc"])])
    assert list(joined) == ["a", "bb", "ccc"]


def test_duplicates_are_named() -> None:
    assert KeyTable.from_strings(["a", "b", "a", "c", "b", "a"]).duplicates() == ["a", "b"]


@given(UNIQUE, st.integers(1, 5))
def test_padding_has_no_key_and_is_never_found_nor_a_duplicate(keys: list[str], padding: int) -> None:
    table = KeyTable.from_strings(
        [*keys, *[""] * padding, *(f"{key}+" for key in keys if f"{key}+" not in keys)]
    )
    assert table.find(KeyTable.from_strings(["", *keys])).tolist() == [-1, *range(len(keys))]
    assert not table.duplicates()
    assert table.is_sound()
