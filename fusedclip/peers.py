"""Other ranks with other gradients: what `group` and `counted_elsewhere` mean, and in which words they are refused."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Union

from torch import Tensor

from .arguments import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group = Union["ProcessGroup", "Sequence[ProcessGroup]"]
Elsewhere = Callable[[Tensor], bool] | Collection[Tensor]


class Peers(NamedTuple):
    """Ranks that hold other gradients than this one, and what this one leaves to them to count."""

    groups: "tuple[ProcessGroup, ...]"
    elsewhere: Elsewhere | None

    def uncounted(self, parameters: list[Tensor]) -> list[int]:
        """Which entries of the list they count."""
        if self.elsewhere is None:
            return []
        if callable(self.elsewhere):
            return [entry for entry, parameter in enumerate(parameters) if self.elsewhere(parameter)]
        elsewhere = {id(parameter) for parameter in self.elsewhere}
        return [entry for entry, parameter in enumerate(parameters) if id(parameter) in elsewhere]


def check_group(group: object, counted_elsewhere: Elsewhere | None = None) -> Peers | None:
    """With process groups that this rank belongs to; None if there is no other rank to ask."""
    if group is None or (isinstance(group, list | tuple) and not group):
        if counted_elsewhere is not None:
            raise ValueError(
                "counted_elsewhere= without group=: no other rank could count these gradients; name the group whose "
                "ranks share them"
            )
        return None
    from torch import distributed  # not before it is asked for: a build of torch may lack it

    groups = tuple(group) if isinstance(group, list | tuple) else (group,)
    for one in groups:
        if distributed.is_available() and isinstance(one, distributed.ProcessGroup):
            continue
        if distributed.is_available() and type(one) is int and one == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group= is a process group that this rank does not belong to")
        way_out = "; pass its .get_group()" if hasattr(one, "get_group") else ""  # of a DeviceMesh
        wanted = "a torch.distributed.ProcessGroup, a list of them or None"
        raise TypeError(f"group= must be {wanted}, got {shown(group)}{way_out}")
    if counted_elsewhere is not None and not callable(counted_elsewhere):
        _check_parameters(counted_elsewhere)
    return Peers(groups, counted_elsewhere)


def _check_parameters(counted_elsewhere: object) -> None:
    listed = isinstance(counted_elsewhere, Collection) and not isinstance(counted_elsewhere, Tensor | str | bytes)
    if not listed or not all(isinstance(item, Tensor) for item in counted_elsewhere):  # type: ignore[attr-defined]
        raise TypeError(
            "counted_elsewhere= must be parameters, in a set or a list, or a function of a parameter, got "
            f"{shown(counted_elsewhere)}"
        )
