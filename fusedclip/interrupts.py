"""Work that an interrupt (Ctrl-C) must not leave half done."""

from collections.abc import Callable, Iterable

Part = tuple[Callable[[], None], Callable[[], bool]]
"""What is done, and what tells after an interrupt whether that has written: then it is done and has left nothing to do;
otherwise it can be done again."""


def all_or_none(parts: Iterable[Part], *, begun: bool = False) -> None:
    """Do each part, even if an interrupt arrives on the way; none if it arrives before the first has written."""
    interrupted: KeyboardInterrupt | None = None
    for part, has_written in parts:
        while True:
            try:
                part()
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
                if not has_written():
                    if not begun:
                        raise
                    continue
            break
        begun = True
    if interrupted is not None:
        raise interrupted


def insist(step: Callable[[], None]) -> None:
    """Do a step that may be done twice, whatever arrives on the way."""
    all_or_none([(step, lambda: False)], begun=True)
