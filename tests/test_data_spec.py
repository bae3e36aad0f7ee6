"""The data grammar."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.data.spec import KEYS, ClassSubset, DataSpec, Split
from kdcli.errors import UsageError
from kdcli.registry import recorded

names = st.text(min_size=1, max_size=8)
whole = st.integers(1, 10**6)
subsets = st.one_of(
    st.sampled_from([ClassSubset("t-split"), ClassSubset("d-split")]),
    st.integers(0, 4).map(lambda tenth: ClassSubset("t-tenth", tenth=tenth)),
    st.builds(
        ClassSubset,
        st.sampled_from(["only", "except"]),
        names=st.lists(
            names | st.sampled_from(["t-split", "t-split/5:7", "d-split", "except:a", "c++", "a,b", "x@y=1"]),
            min_size=1,
            max_size=4,
            unique=True,
        ).map(tuple),
    ),
)
splits = st.one_of(
    st.builds(Split, names | st.sampled_from(["80/20", "80/20:first", "train/80/20:rest", "2017/a"])),
    st.builds(
        Split, st.none() | names.filter(lambda name: not name.isdigit()), st.just((80, 20)), st.integers(0, 1)
    ),
    st.builds(Split, st.none(), st.just((70, 10, 20)), st.integers(0, 2)),
)
sources = st.one_of(
    st.sampled_from(["folder//data/x", "torch/cifar10", "sklearn/digits", "folder/a@b=c/d", "folder/a@2x"]),
    st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text).map(lambda text: f"folder/{text}"),
)


@st.composite
def specs(draw: st.DrawFn) -> DataSpec:
    labels = draw(st.none() | names)
    labelled = draw(st.none() | st.floats(0, 1, exclude_min=True)) if labels != "none" else None
    return DataSpec(
        draw(sources),
        draw(st.none() | splits),
        draw(st.none() | subsets),
        draw(st.none() | whole),
        labelled,
        draw(st.none() | whole),
        labels,
        draw(st.integers(0, 10**9)),
        draw(st.none() | names),
        draw(st.sampled_from([None, "apply", "ignore"])),
    )


@given(specs())
def test_the_text_of_a_spec_parses_to_the_same_spec(spec: DataSpec) -> None:
    assert DataSpec.parse(str(spec)) == spec


@given(st.text())
def test_any_text_is_a_spec_or_a_usage_error(text: str) -> None:
    try:
        spec = DataSpec.parse(text)
    except UsageError:
        return
    assert DataSpec.parse(str(spec)) == spec


def test_all_modifiers_are_read() -> None:
    spec = DataSpec.parse(
        "flowers@split=train,classes=t-split/5:2,shots=5,labelled=0.2,n=100,labels=style,seed=3"
    )
    assert spec == DataSpec(
        "folder/flowers", Split("train"), ClassSubset("t-tenth", tenth=2), 5, 0.2, 100, "style", 3
    )


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("flowers", "folder/flowers"),
        ("/data/flowers", "folder//data/flowers"),
        ("folder/a", "folder/a"),
        ("folder//a", "folder//a"),
        ("./torch/x", "folder/./torch/x"),
        ("torch/cifar10", "torch/cifar10"),
        ("sklearn", "folder/sklearn"),
        ("icons@2x", "folder/icons@2x"),
        ("a@b/c", "folder/a@b/c"),
        ("a@", "folder/a@"),
        ("me@home/run@lr=1/x@seed=0", "folder/me@home/run@lr=1/x"),
        ("/a@split=b@shots=1", "folder//a@split=b"),
        ("my.package:KIND/a@split=b", "my.package:KIND/a"),
        ("my.package:KIND", "my.package:KIND"),
    ],
)
def test_paths_may_contain_at_signs_and_bare_paths_are_folders(text: str, source: str) -> None:
    assert DataSpec.parse(text).source == source


def test_percent_escapes_stand_for_the_grammars_own_characters() -> None:
    spec = DataSpec.parse("x@classes=c%2B%2B+a%2Cb+50%25")
    assert spec.classes == ClassSubset("only", names=("c++", "a,b", "50%"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no data set"),
        ("@split=a", "names no data set"),
        ("x@split=", "key=value"),
        ("x@split=a,", "key=value"),
        ("x@split=a,shots", "key=value"),
        ("x@shot=5", "'shots'"),
        ("x@labeled=.5", "'labelled'"),
        ("x@n=1,n=2", "given twice"),
        ("x@shots=0", "at least 1"),
        ("x@shots=-1", "at least 1"),
        ("x@n=1.5", "whole"),
        ("x@seed=-1", "at least 0"),
        ("x@n=1_0", "whole"),
        pytest.param(f"x@n={'9' * 5000}", "whole", id="endless"),
        ("x@labelled=0", "(0, 1]"),
        ("x@labelled=1.1", "(0, 1]"),
        ("x@labelled=nan", "(0, 1]"),
        ("x@labelled=some", "(0, 1]"),
        ("x@classes=t-split/5:5", "t-split/5:5"),
        ("x@classes=t-split/4:0", "t-split/4:0"),
        ("x@classes=d-split/5:0", "d-split/5:0"),
        ("x@classes=a+", "empty"),
        ("x@classes=except:", "empty"),
        ("x@classes=a+a", "repeated"),
        ("x@labels=none,labelled=0.5", "labels=none"),
        ("x@split=80/30:first", "80/30 does not divide 100 %"),
        ("x@split=100/0:first", "100/0 does not divide 100 %"),
        ("x@split=25/25/25/25:1", "two or three parts"),
        ("x@split=80/20:middle", "no part 'middle'"),
        ("x@split=80/20:1", "no part '1'"),
        ("x@split=train/70/10/20:4", "no part '4'"),
        ("x@split=80/20", "which part"),
        ("x@exif=no", "neither apply nor ignore"),
    ],
)
def test_bad_grammar_is_a_usage_error_that_says_what(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        DataSpec.parse(text)
    assert said in raised.value.message
    assert raised.value.hint


def test_the_grammar_has_the_documented_keys() -> None:
    import kdcli.data.spec as module

    assert all(f"{key}=" in (module.__doc__ or "") for key in KEYS)


def test_a_kind_of_ones_own_may_have_modifiers_and_members() -> None:
    """Of which nothing is loaded here: the text may come from a cache."""
    spec = DataSpec.parse("no.such:KIND/x@size=3%2C4,split=train")
    assert (spec.split, spec.own) == (Split("train"), (("size", "3,4"),))
    assert DataSpec.parse(str(spec)) == spec
    joined = DataSpec.parse("folder/a++b++no.such:KIND@size=3++torch/usps")
    assert [str(each) for each in joined.members] == ["folder/a++b", "no.such:KIND@size=3", "torch/usps"]
    assert DataSpec.parse(str(joined)) == joined
    with pytest.raises(UsageError, match="Python code"):
        recorded(str(joined))
    assert recorded("folder/a:b/c++torch/usps") == "folder/a:b/c++torch/usps"
