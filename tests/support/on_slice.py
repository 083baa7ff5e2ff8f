"""An engine that tells what slice it was given."""

from __future__ import annotations

from collections.abc import AsyncIterator

from nearfield.api.events import GenerateRequest
from nearfield.serving.engines.base import EngineContext, FunctionEngine


class OnSlice(FunctionEngine):
    """Says its name, how many hosts, and chips of each."""

    def setup(self, context: EngineContext) -> None:
        assert context.slice is not None
        self.slice = context.slice

    async def generate(self, request: GenerateRequest) -> AsyncIterator[str]:
        yield f"{self.slice.name} {len(self.slice.hosts)}x{self.slice.chips}"
