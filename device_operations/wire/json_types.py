"""Names for JSON, so that a signature says which form of it is meant."""

from __future__ import annotations

from typing import Any, TypeAlias

#: A JSON object that is passed on and not read.
JsonObject: TypeAlias = dict[str, object]

#: A JSON object that is read by keys that its type cannot say, such as the request of any kind of job.
FreeJson: TypeAlias = dict[str, Any]
