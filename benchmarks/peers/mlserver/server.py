"""Start MLServer in its own process: one process is faster here than its worker pool of one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from encoder import MAX_BATCH
from mlserver import MLServer, ModelSettings, Settings
from runtime import Embed

BATCH_WAIT_S = float(os.environ.get("BENCH_BATCH_WAIT_S", "0.002"))


async def main() -> None:
    scratch = Path(os.environ["BENCH_DIR"])
    port = int(os.environ["BENCH_PORT"])
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=port,
        grpc_port=int(os.environ["BENCH_PORT_2"]),
        metrics_endpoint=None,
        metrics_dir=str(scratch),
        environments_dir=str(scratch),
        parallel_workers=int(os.environ.get("BENCH_WORKERS", "0")),
        gzip_enabled=False,
    )
    server = MLServer(settings)
    model = ModelSettings(
        name="embed",
        implementation=Embed,
        max_batch_size=MAX_BATCH,
        max_batch_time=BATCH_WAIT_S,
    )
    await server.start([model])


if __name__ == "__main__":
    asyncio.run(main())
