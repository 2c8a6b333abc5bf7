"""Commands of the command line that are too long for `cli`: those about mounts."""

from mcorefs.commands.mount import mount, umount

__all__ = ["mount", "umount"]
