"""What commands do whose steps give plain documents."""

from kdcli.comparing.compare import compare as compare_step
from kdcli.comparing.config import CompareConfig
from kdcli.comparing.figures import write_figures
from kdcli.comparing.result import CompareResult
from kdcli.console import console
from kdcli.demo.config import DemoConfig
from kdcli.demo.demo import run_demo as demo_step
from kdcli.demo.result import DemoResult
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.fuse import fuse_teachers as fuse
from kdcli.training.soup import make_soup
from kdcli.training.soup_config import SoupConfig
from kdcli.verbs.results import FuseResult, SoupResult


def fuse_teachers(config: FuseConfig) -> FuseResult:
    """Train a joint teacher on cached teachers; see :func:`kdcli.fusing.fuse.fuse_teachers`."""
    return FuseResult(fuse(config)["joint"])


def soup(config: SoupConfig) -> SoupResult:
    """Average the weights of students that share a start; see :func:`kdcli.training.soup.make_soup`."""
    return SoupResult(make_soup(config))


def compare(config: CompareConfig) -> CompareResult:
    """Compare what models know: flips, gains and losses; see :func:`kdcli.comparing.compare.compare`."""
    result = compare_step(config)
    if config.figures is not None:
        for path in write_figures(result, config.figures):
            console.note(f"wrote {path}")
    return result


def run_demo(config: DemoConfig) -> DemoResult:
    """Run the whole main job on real images and weights; see :func:`kdcli.demo.demo.run_demo`."""
    return demo_step(config.out)
