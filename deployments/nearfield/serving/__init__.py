"""Serving one model on Ray Serve. `import_path: nearfield.serving:app` builds its application.

Nothing is imported here until it is asked for: a user's engine module imports
`nearfield.serving.engines.base` and gets neither Ray nor a web server with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfield.serving.builder import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from nearfield.serving.builder import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
