"""The region's control plane: what runs in its cluster beside the models.

`import_path: nearfield.control:app` is the agent, which tells gateways where the replicas are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfield.control.agent import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from nearfield.control.agent import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
