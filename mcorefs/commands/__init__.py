"""Commands of the command line that are too long for `cli`: those about mounts."""

from mcorefs.commands.mount import mount, umount
from mcorefs.commands.status import status

__all__ = ["mount", "status", "umount"]
