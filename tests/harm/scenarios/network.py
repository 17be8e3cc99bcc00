"""The line between exporter and server freezes, breaks and loses bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.harm.scene import Scenario, Scene


@contextmanager
def _black_hole(scene: Scene) -> Iterator[None]:
    """Connections open and new are taken, and nothing is ever said."""
    scene.line.freeze()
    yield
    scene.line.cut()
    scene.line.thaw()


@contextmanager
def _half(scene: Scene) -> Iterator[None]:
    """The first 2,000 bytes of the answer arrive, and no more."""
    scene.line.swallow(2000)
    yield
    scene.line.swallow(None)
    scene.line.cut()


@contextmanager
def _cut_amid(scene: Scene) -> Iterator[None]:
    """The line is reset during a scrape, after which nobody listens."""

    def cut() -> None:
        scene.line.refuse()
        scene.line.cut()

    scene.amid_next_scrape(0.005, cut)
    scene.scrape()
    scene.during.clear()  # it may have been quicker than the cut
    yield
    scene.line.accept()


@contextmanager
def _silent_amid(scene: Scene) -> Iterator[None]:
    """The line goes silent during a scrape and comes back by itself."""
    scene.amid_next_scrape(0.005, scene.line.freeze)
    yield
    scene.line.thaw()


# Who gives up at a deadline may have what it asked cancelled, which the server tells as well.
_LOST = (
    "connection to client lost|could not (send data to|receive data from) client"
    "|canceling statement due to user request"
)

SCENARIOS = (
    Scenario("the network turns into a black hole", _black_hole, "down", line=True, provoked=_LOST),
    Scenario("half an answer arrives", _half, "either", line=True, provoked=_LOST),
    Scenario("the network is cut during a query", _cut_amid, "down", line=True, provoked=_LOST),
    Scenario(
        "the network stalls and comes back", _silent_amid, "either", line=True, provoked=_LOST
    ),
)
