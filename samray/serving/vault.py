"""The Ray Serve deployment that keeps image files, and the cache that it and the Decoder use.

Nothing here imports torch, which takes 400 MB in each process.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from samray.config import ServeConfig


@dataclass
class ByteCache:
    """An LRU cache bounded by the sum of its values' sizes."""

    max_bytes: int
    used: int = 0
    entries: OrderedDict[Any, tuple[Any, int]] = field(default_factory=OrderedDict)

    def get(self, key: Any) -> Any:
        """Return a value, or None."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep a value, and evict the least recently used ones; a value above the bound, too."""
        self.drop(key)
        self.entries[key] = (value, size)
        self.used += size
        while self.used > self.max_bytes:
            _, (_, freed) = self.entries.popitem(last=False)
            self.used -= freed

    def drop(self, key: Any) -> bool:
        """Drop a value; return whether it was there."""
        entry = self.entries.pop(key, None)
        self.used -= entry[1] if entry else 0
        return entry is not None


@serve.deployment(max_ongoing_requests=256)
class ImageVault:
    """The image files in use, by digest, within a bound. Clients upload again what was evicted."""

    def __init__(self, settings: ServeConfig) -> None:
        self.files = ByteCache(settings.image_cache_mb * 2**20)

    async def put(self, image_id: str, raw: bytes) -> None:
        """Keep a file."""
        self.files.put(image_id, raw, len(raw))

    async def get(self, image_id: str) -> bytes | None:
        """Return a file, or None."""
        raw: bytes | None = self.files.get(image_id)
        return raw

    async def drop(self, image_id: str) -> bool:
        """Drop a file; return whether it was there."""
        return self.files.drop(image_id)
