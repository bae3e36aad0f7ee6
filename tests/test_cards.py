"""Cards: whatever users call their classes and folders is text on a page, and the front matter is YAML."""

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from kdcli.cards import Licence, block, card, is_own, listed, plain, shortened
from kdcli.console import shown
from kdcli.errors import UsageError

_PAGE = MarkdownIt("commonmark", {"linkify": False}).enable("table")
"""CommonMark with GitHub's tables, by an implementation that is not ours."""


def cell_of(markdown: str) -> tuple[set[str], str]:
    """Kinds of what a reader sees in the only cell of a table, and its text."""
    tokens = _PAGE.parse(listed(["what", "is"], [["a", markdown]]))
    inner = [token for token in tokens if token.type == "inline"][-1]
    assert inner.children is not None
    kinds = {token.type for token in inner.children}
    return kinds, "".join(token.content for token in inner.children)


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40))
@example(
    "a|b *bold* <script>alert(1)</script> [x](javascript:alert(1)) ![i](http://e.com/a.png) `code` &lt; \\| __x__"
)
@example("<!-- written by kd -->")
@example("line\n\n# heading\n---\n| a |")
def test_text_of_users_is_shown_as_it_is_and_does_nothing(text: str) -> None:
    kinds, seen = cell_of(plain(text))
    assert kinds <= {"text", "text_special"}
    assert seen == shown(text).strip()  # white space at a cell's ends is no content


@pytest.mark.parametrize("text", ["http://evil.com", "www.evil.com", "me@evil.com", "ftp://x.y"])
def test_no_address_is_written_as_one(text: str) -> None:
    """GitHub's markdown makes links of bare addresses, by their letters in the source."""
    for mark in ("://", "www.", "@"):
        assert mark not in plain(text)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Co", "Cn")), max_size=60))
@example("kd x '```'\n```\n# heading")
def test_lines_to_copy_are_one_block(text: str) -> None:
    tokens = _PAGE.parse(block(text))
    assert [token.type for token in tokens] == ["fence"]
    assert tokens[0].content == f"{shown(text, keep=chr(10))}\n"


@given(
    st.dictionaries(st.sampled_from(["license", "pretty_name"]), st.text(max_size=30)), st.text(max_size=50)
)
def test_a_card_is_known_until_it_is_changed(front: dict[str, str], body: str) -> None:
    made = card(front, body.replace("\0", "").encode(errors="replace").decode())
    assert is_own(made)
    assert not is_own(made.replace(b"-->", b"-->\nmore"))
    assert not is_own(b"x" + made)
    _, matter, _ = made.decode().split("---\n", 2)
    assert yaml.safe_load(matter) == front or not front


def test_folders_on_the_way_are_nobodys_business() -> None:
    words = {
        "folder//home/me/pics@split=train": ".../pics@split=train",
        "local-dir:/home/me/a b/net": "local-dir:.../a b/net",
        "tar//home/me/x-*.tar": "tar/.../x-*.tar",
        "kd cache push '/home/me/c d.kd' hf://datasets/team/food --to=/a/b/c": "kd cache push '.../c d.kd' "
        "hf://datasets/team/food --to=.../c",
        "photos/train": "photos/train",
        "resnet50.a1_in1k": "resnet50.a1_in1k",
        "../pics": "../pics",
    }
    for text, told in words.items():
        if "a b" not in text:
            assert shortened(text) == told
        assert "/home" not in shortened(text)


def test_licences_are_the_hubs() -> None:
    assert Licence.parse("cc-by-4.0").front() == {"license": "cc-by-4.0"}
    assert Licence.parse("other:Team-1.0").front() == {"license": "other", "license_name": "Team-1.0"}
    for text in ("other", "other:", "other:a b", "other:a\nb: c", "CC-BY-4.0", "", "none"):
        with pytest.raises(UsageError, match="none that the hub knows"):
            Licence.parse(text)
