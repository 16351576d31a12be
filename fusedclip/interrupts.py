"""Work that an interrupt (Ctrl-C) must not leave half done."""

from collections.abc import Callable

Part = tuple[Callable[[], None], Callable[[], bool]]
"""What is done, and what tells after an interrupt whether that has written: then it is done and has left nothing to do;
otherwise it can be done again."""


def all_or_none(left: list[Part], *, begun: bool = False) -> None:
    """Do each part, even if an interrupt arrives on the way; none if it arrives before the first has written. The list
    is empty then."""
    interrupted: KeyboardInterrupt | None = None
    while left:
        try:
            while left:  # in here also between two parts
                left[0][0]()
                begun = True
                del left[0]
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
            if left and left[0][1]():
                begun = True
                del left[0]
            if not begun:
                raise
    if interrupted is not None:
        raise interrupted


def insist(step: Callable[[], None]) -> None:
    """Do a step that may be done twice, whatever arrives on the way."""
    all_or_none([(step, lambda: False)], begun=True)
