"""Settings of the server; apart, since flags are made of them before anything is loaded."""

import dataclasses

from xmc_jax.shipping.predict_config import INDEXES


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, how it gathers requests, and what it refuses.

    Attributes:
        host: address it listens at; 0.0.0.0 is all of the machine's.
        port: likewise; 0 is any that is free.
        allowed_hosts: names and addresses that requests may be made to, besides `host` and those of
            this machine alone; * is any. Other names are refused: a page elsewhere could have its
            own name point here.
        index: see `PredictConfig`.
        max_batch: queries ranked in one call; 1 ranks each request by itself.
        max_wait_ms: milliseconds, and no more than a quarter of what the last batch took, that a
            batch waits to be as full as those that asked at once before.
        queue: queries, and images of queries, that may wait; beyond it 503.
        max_queries: queries of a request.
        max_k: labels or documents per query.
        max_text: characters of a text.
        max_only: label ids that a query may be held to.
        max_exclude: label ids that a query may exclude; who asks page after page excludes all
            labels of the pages before.
        max_body: bytes of a request.
        max_held: bytes of all requests in progress; beyond it 503.
        max_image_bytes: bytes of an image's file.
        max_image_pixels: pixels of an image.
        max_connections: open at a time; beyond it 503.
        timeout: seconds until a request is answered with 503 that is not yet ranked.
        read_timeout: seconds in which a request must arrive, and its answer be taken.
        keep_alive: seconds that a connection may be idle.
        stuck_after: seconds that one call of the model may take; beyond it /healthz answers 503, so
            that the process is started again.
        show_documents: whether answers may hold texts and pictures of training documents; if not
            given, while the server listens to this machine alone.
        drain: seconds that requests in progress have when the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    index: str = "auto"
    max_batch: int = 32
    max_wait_ms: float = 20.0
    queue: int = 512
    max_queries: int = 32
    max_k: int = 100
    max_text: int = 10_000
    max_only: int = 4_096
    max_exclude: int = 4_096
    max_body: int = 2**24
    max_held: int = 2**28
    max_image_bytes: int = 2**23
    max_image_pixels: int = 2**24
    max_connections: int = 1_000
    timeout: float = 30.0
    read_timeout: float = 20.0
    keep_alive: int = 30
    drain: int = 30
    stuck_after: float = 60.0
    show_documents: bool | None = None

    def __post_init__(self):
        self._expect("port", 0 <= self.port < 2**16, "a number in [0, 65535]")
        self._expect("index", self.index in INDEXES, f"one of {INDEXES}")
        self._expect("max_wait_ms", 0 <= self.max_wait_ms <= 1_000, "0 to 1000")
        for name in ("max_only", "max_exclude"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        for name in (
            *("max_batch", "queue", "max_queries", "max_k", "max_text", "max_body", "max_held"),
            *("max_image_bytes", "max_image_pixels", "max_connections", "keep_alive", "drain"),
        ):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("timeout", "read_timeout", "stuck_after"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        self._expect(
            "queue", self.queue >= self.max_queries, f"max_queries, {self.max_queries}, or more"
        )
        self._expect(
            "max_held", self.max_held >= self.max_body, f"max_body, {self.max_body}, or more"
        )

    def _expect(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"serve.{name}: expected {what}, got {getattr(self, name)!r}")

    @property
    def rows(self) -> tuple[int, ...]:
        """Sizes of the blocks that are compiled; see `query_encoder.QueryEncoder.encode`."""
        return tuple(size for size in (1, 8) if size < self.max_batch) + (self.max_batch,)
