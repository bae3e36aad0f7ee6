"""P1, Representation Consolidation from Multiple Expert Teachers: its experts, students and probes.

starts/ARCH              a generalist, where none has ImageNet's weights (setting pretrain.epochs)
experts/NAME             an expert of half the classes of its data; TASK-PART-ARCH: of a tenth (Exp. 2)
PROXY/cache              what generalist and experts say of a proxy
PROXY/FAMILY/students    KD, CRD, and ours by both, of the same experts, over one stream of a proxy
PROXY/FAMILY/mtl         the oracle, which learns from the labels of ImageNet and of the expert's data
PROXY/FAMILY/probe       few-shot probes on the targets; probe-TARGET: where an image has several labels
PROXY/FAMILY/old         the experts' own task (Table 2)
PROXY/FAMILY/few, full   fine-tuning (Tables 6 and 7)
"""

from collections.abc import Iterator

from lab.p1.experts import Sources, experts
from lab.p1.judging import Judging
from lab.p1.students import Students
from lab.p1.tables import measured
from lab.settings import Settings
from lab.steps import Lab, Step

__all__ = ["measured", "networks", "steps"]


def steps(lab: Lab) -> list[Step]:
    """Every command, in order."""
    return list(_steps(lab))


def networks(settings: Settings) -> list[str]:
    """Generalists by architecture, and experts, that ``--model`` may name."""
    return [*settings["architectures"], *(expert.name for expert in experts(settings))]


def _steps(lab: Lab) -> Iterator[Step]:
    source = Sources(lab)
    students, judging = Students(source), Judging(Students(source))
    yield from source.starts()
    yield from (source.expert(each) for each in experts(lab.settings) if each.name not in lab.places.models)
    yield from students.caches()
    for family in students.families():
        yield students.students(family)
        if students.has_mtl(family):
            yield students.mtl(family)
        yield from judging.steps(family)
