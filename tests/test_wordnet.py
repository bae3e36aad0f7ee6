"""Names of ImageNet's classes for people, against timm's own table."""

from timm.data import ImageNetInfo

from kdcli.models.wordnet import readable


def test_wordnet_ids_are_called_what_timm_calls_them() -> None:
    info = ImageNetInfo()
    names = info.label_names()
    assert readable("n02123045") == "tabby"
    assert [readable(name) for name in names] == [
        info.index_to_description(i).split(",")[0] for i in range(len(names))
    ]
    assert readable("n00007846") == "person"  # of ImageNet-22k


def test_all_other_names_stay() -> None:
    for name in ("cat", "n99999999", "n0212304", "xn02123045", ""):
        assert readable(name) == name
